"""What no check in Python sees: compiled, exported and vmapped calls, freed memory, tensors that change in between."""

import pytest
import torch

import mmkern

V, D, K = 10, 8, 12  # vocabulary, channels, keys
FAR = [2**63 - 1, -(2**63), 0]


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def floats(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "q": floats(2, 2, 3, D), "k": floats(2, 2, K, D), "v": floats(2, 2, K, D), "lengths": torch.tensor([5, 12]),
        "tokens": torch.tensor([[0, 9, 3], [1, 2, 2]]), "weight": floats(V, D), "table": floats(6, D),
        "offsets": torch.tensor([0, 3]), "positions": torch.tensor([4, 0, 2]), "targets": torch.tensor([0, 9, 4]),
    }  # fmt: skip


def attend(q, k, v, lengths):
    """Lengths hide keys, and tell where the last query stands."""
    return mmkern.scaled_dot_product_attention(
        q, k, v, key_lengths=lengths, causal_alignment="lower_right", is_causal=True
    )


def every_op(q, k, v, lengths, tokens, weight, table, offsets, positions, targets):
    """Each op that indexes memory with values."""
    embedded = mmkern.embed_tokens(tokens, weight)
    placed = mmkern.add_positional_encoding(embedded, table, offset=offsets)
    attended, turned = attend(q, k, v, lengths), mmkern.rotary(q, positions=positions)
    loss = mmkern.cross_entropy(weight[:3] @ weight.t(), targets)
    fused = mmkern.linear_cross_entropy(weight[:3], weight, targets)
    return torch.cat([t.flatten() for t in (embedded, placed, attended, turned, loss, fused)])


class Model(torch.nn.Module):
    def forward(self, *args):
        return every_op(*args)


def aoti(function, example):
    package = torch._inductor.aoti_compile_and_package(torch.export.export(Model(), example))
    return torch._inductor.aoti_load_package(package)


DOORS = {
    "aot_eager": lambda function, example: torch.compile(function, backend="aot_eager", fullgraph=True),
    "inductor": lambda function, example: torch.compile(function, fullgraph=True),
    "export": lambda function, example: torch.export.export(Model(), example).module(),
    "aoti": aoti,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("door", DOORS)
def test_values_beyond_bounds_in_a_graph(door, dtype):
    """Lengths are clamped, positions are any int64; tokens, targets and rows of a table that do not exist raise."""
    if door == "aoti" and dtype == torch.float64:
        pytest.skip("compiled as by inductor, half a minute more")
    given = inputs(dtype)
    graph = DOORS[door](every_op, tuple(given.values()))

    def run(**changed):
        return graph(*(given | changed).values())

    torch.testing.assert_close(run(), every_op(*given.values()))
    for lengths in torch.tensor([[13, 12], [300, -5], [2**62, -(2**63)]]):
        expected = every_op(*(given | {"lengths": lengths.clamp(0, K)}).values())
        torch.testing.assert_close(run(lengths=lengths), expected)
    if dtype == torch.float32:  # a double has no digits of such an angle: any sine will do
        expected = every_op(*(given | {"positions": torch.tensor(FAR)}).values())
        torch.testing.assert_close(run(positions=torch.tensor(FAR)), expected)
    for name, wrong in (
        ("tokens", [[0, V, 3], [1, 2, 2]]), ("tokens", [[0, 1, 3], [1, -1, 2]]), ("tokens", [[2**62, 1, 3], [1, 1, 2]]),
        ("targets", [0, V, 4]), ("targets", [0, -1, 4]), ("targets", [0, -(2**63), 4]),
        ("offsets", [0, 4]), ("offsets", [-1, 0]), ("offsets", FAR[:2]),
    ):  # fmt: skip
        with pytest.raises((IndexError, RuntimeError)):
            run(**{name: torch.tensor(wrong)})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_of_clamped_lengths_in_a_graph(backend):
    found = []
    for function in (torch.compile(attend, backend=backend), attend):
        given = inputs()
        q, k, v = (given[name].requires_grad_() for name in "qkv")
        lengths = torch.tensor([300, -5])
        function(q, k, v, lengths if function is not attend else lengths.clamp(0, K)).square().sum().backward()
        found.append([t.grad for t in (q, k, v)])
    torch.testing.assert_close(*found)


def test_clamped_lengths_on_every_backend():
    """The operator itself: Python refuses such lengths in a call that it sees."""
    given, far = inputs(), torch.tensor([300, -5])
    rest = (None, 0.0, True, 0.3, 0, None, -1, -1, 0.0, torch.rand(2, 2))
    for lengths, same in ((far, far.clamp(0, K)), (torch.tensor(FAR[:2]), far.clamp(0, K))):
        args = [given["q"], given["k"], given["v"], *rest]
        kernel = torch.ops.mmkern.attention_fwd(*args, lengths, None, True, None)
        clamped = torch.ops.mmkern.attention_fwd(*args, same, None, True, None)
        formula = mmkern.reference.attention(*args, lengths, None, True, None)
        for a, b, c in zip(kernel, clamped, formula, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            torch.testing.assert_close(a, c)


def test_vmapped_values_beyond_bounds():
    given = inputs()
    q, k, v = (given[name] for name in "qkv")
    far = torch.tensor([[300, -5], [13, 2**62]])
    found = torch.vmap(attend, in_dims=(None, None, None, 0))(q, k, v, far)
    for one, lengths in zip(found, far, strict=True):
        torch.testing.assert_close(one, attend(q, k, v, lengths.clamp(0, K)))
    turned = torch.vmap(lambda p: mmkern.rotary(q, positions=p))(torch.tensor([FAR, [4, 0, 2]]))
    torch.testing.assert_close(turned[1], mmkern.rotary(q, positions=given["positions"]))
    assert turned[0].isfinite().all()
    for wrong in (V, -1):
        index = torch.tensor([[0, wrong, 4], [0, 1, 2]])
        for op in (
            lambda t: mmkern.embed_tokens(t, given["weight"]),
            lambda t: mmkern.cross_entropy(given["weight"][:3] @ given["weight"].t(), t),
            lambda t: mmkern.linear_cross_entropy(given["weight"][:3], given["weight"], t),
        ):
            with pytest.raises((IndexError, RuntimeError)):
                torch.vmap(op)(index)


@pytest.mark.parametrize("wrong", [V, V + 1000, -1, 2**62])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_filled_anew_between_forward_and_backward(wrong, dtype):
    """A loader that uses one buffer again; torch.nn.functional.embedding survives it, too."""
    tokens, weight = torch.tensor([[1, 2], [3, 4]]), torch.randn(V, D, dtype=dtype, requires_grad=True)
    out = mmkern.embed_tokens(tokens, weight)
    tokens.numpy()[:] = wrong  # behind autograd's back
    out.sum().backward()
    assert not weight.grad.any()  # an id without a row adds to none, as in torch's op
    weight.grad = None
    tokens.numpy()[:] = 3
    out = mmkern.embed_tokens(tokens, weight)
    tokens.numpy()[:] = 7  # another batch: its rows, as torch's op
    out.sum().backward()
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight).index_fill(0, torch.tensor(7), 4.0))


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


FREED = {
    "scaled_dot_product_attention": ((2, 2, 4, D),) * 3,
    "softmax": ((3, D), None),
    "log_softmax": ((3, D), None),
    "masked_softmax": ((3, D), (3, D)),
    "add_positional_encoding": ((1, 4, D), (4, D)),
    "rotary": ((2, 4, D), (2, 4, D)),
    "cross_entropy": ((3, D), (3, D)),
}


@pytest.mark.parametrize("op", FREED)
def test_freed_storage_is_an_error(op):
    """As FSDP frees it: torch's own ops raise, too. Each tensor in turn."""
    for place, shape in enumerate(FREED[op]):
        if shape is None:
            continue
        args = [-1 if s is None else torch.rand(s) for s in FREED[op]]
        args[place] = freed(args[place])
        with pytest.raises(ValueError, match="was it freed"):
            getattr(mmkern, op)(*args)


def test_freed_storage_of_tokens_and_of_what_backward_reads():
    weight, tokens = torch.rand(V, D), torch.tensor([[1, 2]])
    for args in ((freed(tokens), weight), (tokens, freed(weight))):
        with pytest.raises(ValueError, match="was it freed"):
            mmkern.embed_tokens(*args)
    hidden, target = torch.rand(2, D), torch.tensor([1, 2])
    for args in ((freed(hidden), weight, target), (hidden, freed(weight), target), (hidden, weight, freed(target))):
        with pytest.raises(ValueError, match="was it freed"):
            mmkern.linear_cross_entropy(*args)
    x = torch.rand(3, D, requires_grad=True)
    y = mmkern.softmax(x, -1)
    y.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"output: .*was it freed"):
        y.backward(torch.rand(3, D))


def test_half_a_storage_is_an_error():
    x = torch.rand(4, D)
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)
    with pytest.raises(ValueError, match=r"input: its storage of 127 bytes .* shape \(4, 8\) and strides \(8, 1\)"):
        mmkern.softmax(x, -1)


def test_what_lies_behind_the_keys_reaches_no_gradient():
    """Scratch memory of the call before, full of NaN: a capped cosine of a hidden key times 0."""
    query, slopes = torch.randn(1, 2, 40, 16), torch.rand(1, 2)

    def gradient(key, mask):
        temperature = torch.ones(2, requires_grad=True)
        mmkern.scaled_dot_product_attention(
            query, key, key, mask, similarity="cosine", temperature=temperature, softcap=2.0, alibi_slopes=slopes
        ).sum().backward()
        return temperature.grad

    mask = torch.zeros(1, 1, 40, 1, dtype=torch.bool)
    for _ in range(2):
        gradient(torch.full((1, 2, 64, 16), torch.nan), None)
        assert gradient(torch.randn(1, 2, 1, 16), mask).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("offset", [0, 5, 2**62, 2**63 - 2, -(2**63), -3])
def test_positions_wrap_as_int64_does(offset):
    """Beyond 2^63 a position is negative, in sines as in torch's integers; the bits are those of that position."""
    x = torch.zeros(2, 1, 4, D)
    found = mmkern.add_positional_encoding(x, offset=torch.full((2,), offset))
    for t in range(4):
        place = (offset + t + 2**63) % 2**64 - 2**63
        one = mmkern.add_positional_encoding(x[:, :, :1], offset=torch.full((2,), place))
        assert torch.equal(found[:, :, t : t + 1], one)
