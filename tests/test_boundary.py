"""What no check in Python sees: compiled, exported and vmapped calls, freed memory, tensors that change in between."""


import pytest
import torch


import mmkern

V, D, K = 10, 8, 12  # vocabulary, channels, keys


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def floats(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "q": floats(2, 2, 3, D), "k": floats(2, 2, K, D), "v": floats(2, 2, K, D), "lengths": torch.tensor([5, 12]),
        "tokens": torch.tensor([[0, 9, 3], [1, 2, 2]]), "weight": floats(V, D), "table": floats(6, D),
        "offsets": torch.tensor([0, 3]), "positions": torch.tensor([4, 0, 2]), "targets": torch.tensor([0, 9, 4]),
    }  # fmt: skip


def every_op(q, k, v, lengths, tokens, weight, table, offsets, positions, targets):
    """Each op that indexes memory with values; one that raises hides the ones behind it."""
    embedded = mmkern.embed_tokens(tokens, weight)
    placed = mmkern.add_positional_encoding(embedded, table, offset=offsets)
    # key_lengths hide keys and tell where the last query stands.
    attended = mmkern.scaled_dot_product_attention(
        q, k, v, key_lengths=lengths, causal_alignment="lower_right", is_causal=True
    )
    turned = mmkern.rotary(q, positions=positions)
    hidden = weight[:3]
    losses = mmkern.cross_entropy(hidden, targets % D), mmkern.cross_entropy(hidden @ weight.t(), targets)
    return embedded, placed, attended, turned, *losses, mmkern.linear_cross_entropy(hidden, weight, targets)


def flat(values):
    return torch.cat([v.detach().flatten() for v in values])


def doors(function, example):
    yield "eager", function
    yield "aot_eager", torch.compile(function, backend="aot_eager", fullgraph=True)
    yield "inductor", torch.compile(function, fullgraph=True)

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    exported = torch.export.export(Module(), example)
    yield "export", exported.module()
    yield "aoti", torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(exported))
