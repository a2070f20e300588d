"""torch's functions done by mmkern: inside a block, in a model, in its copies, and seen by whoever watches calls."""

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

import mmkern
import mmkern.testing
from mmkern.integrations import torch as integration

OPS = ("scaled_dot_product_attention", "softmax", "log_softmax", "multi_head_attention_forward")
MODEL_OPS = ["attention_fwd", "softmax_fwd", "log_softmax_fwd"]


def ops_of(function, *args, **kwargs) -> list[str]:
    with torch.no_grad():
        return [choice.op for choice in mmkern.explain(function, *args, **kwargs)]


def attend(x: torch.Tensor) -> torch.Tensor:
    return F.softmax(F.scaled_dot_product_attention(x, x, x, is_causal=True), dim=-1)


def test_patched_is_explicit_nested_and_undone():
    before = {name: getattr(F, name) for name in OPS}
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = attend(x)
    assert ops_of(attend, x) == []
    with integration.patched():
        with integration.patched():
            assert F.scaled_dot_product_attention is integration.scaled_dot_product_attention
        assert ops_of(attend, x) == ["attention_fwd", "softmax_fwd"]
        assert torch.allclose(attend(x), expected, atol=1e-6)
        assert F.softmax(x, -1, dtype=torch.float64).dtype == torch.float64
        with pytest.warns(UserWarning, match="Implicit dimension"):
            F.softmax(x)
    assert {name: getattr(F, name) for name in OPS} == before
    with pytest.raises(ZeroDivisionError), integration.patched():
        1 / 0  # noqa: B018
    assert {name: getattr(F, name) for name in OPS} == before
    assert ops_of(attend, x) == []


@pytest.mark.parametrize("grad", [False, True])
def test_patch_reaches_torch_encoder_layers_even_in_inference(grad):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).eval()
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 7, 32)
    with torch.set_grad_enabled(grad):
        expected = encoder(x)
        fast = torch.backends.mha.get_fastpath_enabled()
        assert integration.patch(encoder) is encoder
        assert integration.patch(encoder) is encoder
        assert [c.op for c in mmkern.explain(encoder, x)] == ["attention_fwd"] * 2
        assert torch.allclose(encoder(x), expected, atol=1e-5)
        assert integration.unpatch(encoder) is encoder
        assert [c.op for c in mmkern.explain(encoder, x)] == []
        assert torch.equal(encoder(x), expected)
    assert "forward" not in vars(encoder)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    integration.unpatch(encoder)


def test_gradients_pass_through_a_patched_model():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)

    def gradient():
        attention.zero_grad()
        attention(x, x, x, need_weights=False)[0].square().sum().backward()
        return attention.in_proj_weight.grad.clone()

    expected = gradient()
    integration.patch(attention)
    assert torch.allclose(gradient(), expected, rtol=1e-4, atol=1e-5)


def test_importing_patches_nothing():
    code = (
        "import torch.nn.functional as F; before = F.scaled_dot_product_attention, F.softmax;"
        "import mmkern, mmkern.integrations.torch, sys;"
        "assert before == (F.scaled_dot_product_attention, F.softmax);"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
def test_cross_entropy_is_patched_with_its_gradient():
    x, target, weight = mmkern.testing.randn(6, 9).requires_grad_(), torch.tensor([0, 8, 3, -100, 1, 1]), torch.rand(9)
    loss = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    want = torch.autograd.grad(loss(x, target), x)[0]
    with integration.patched():
        ran = mmkern.explain(lambda: loss(x, target).backward())
        summed = torch.nn.functional.cross_entropy(x, target, size_average=False)
    assert next(choice.op for choice in ran) == "cross_entropy_fwd"
    torch.testing.assert_close(x.grad, want)
    torch.testing.assert_close(summed, torch.nn.functional.cross_entropy(x, target, reduction="sum"))


# ---- Copies of a patched model


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.softmax = torch.nn.Softmax(-1)

    def forward(self, x, twice=False):
        if twice:
            raise ZeroDivisionError
        return self.softmax(self.layer(x)) + F.log_softmax(x, dim=-1)


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


X = mmkern.testing.randn(2, 5, 16)


def loaded(patched):
    file = io.BytesIO()
    torch.save(patched, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda patched: pickle.loads(pickle.dumps(patched)),
    "torch.save": loaded,
    "average": lambda patched: torch.optim.swa_utils.AveragedModel(patched).module,
    "replica": lambda patched: patched._replicate_for_data_parallel(),
    "again": integration.patch,
    "of a copy": lambda patched: integration.patch(copy.deepcopy(integration.unpatch(patched))),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_patched_and_computes_with_its_own_weights(kind):
    expected = model()(X)
    patched = integration.patch(model())
    assert isinstance(patched, Model)
    assert "forward" not in vars(patched)
    assert str(type(patched)) == str(Model)
    made = COPIES[kind](patched)
    torch.testing.assert_close(made(X), expected)
    assert ops_of(made, X) == ops_of(made.forward, X) == MODEL_OPS
    if kind not in ("copy", "replica", "again"):
        with torch.no_grad():
            for p in made.parameters():
                p.zero_()
            assert torch.equal(made(X), model().apply(lambda m: [p.zero_() for p in m.parameters(False)])(X))
        torch.testing.assert_close(patched(X), expected)
    assert type(integration.unpatch(made)) is Model
    assert ops_of(made, X) == []


def test_another_process_is_given_the_patched_model():
    source = integration.patch(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval())
    code = (
        "import pickle, sys, torch, mmkern; torch.set_num_threads(1); model, x = pickle.load(sys.stdin.buffer);"
        "y = []; ops = [c.op for c in mmkern.explain(lambda: y.append(model(x)))];"
        "pickle.dump((y[0].detach(), ops), sys.stdout.buffer)"
    )
    ran = subprocess.run([sys.executable, "-c", code], input=pickle.dumps((source, X)), capture_output=True, check=True)
    found, ops = pickle.loads(ran.stdout)
    torch.testing.assert_close(found, source(X).detach())
    assert ops == ["attention_fwd"]


@pytest.mark.parametrize("grad", [False, True])
def test_a_patched_model_compiles_whole(grad):
    torch._dynamo.reset()
    before = {name: getattr(F, name) for name in OPS}
    patched, graphs = integration.patch(model()), []

    def backend(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    with torch.set_grad_enabled(grad):
        expected = model()(X)
        compiled = torch.compile(patched, fullgraph=True, backend=backend)
        for _ in range(2):
            torch.testing.assert_close(compiled(X), expected)
        ours = [name for name in graphs[0] if "mmkern" in name or name == "autograd_function_apply"]
        assert (len(graphs), len(ours)) == (1, 3), graphs
        assert {name: getattr(F, name) for name in OPS} == before
        integration.unpatch(compiled)
        torch.testing.assert_close(compiled(X), expected)
    assert not any("mmkern" in name or name == "autograd_function_apply" for name in graphs[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_block_around_compiled_code_and_traces_of_a_patched_model():
    torch._dynamo.reset()
    patched, plain = integration.patch(model()), model()
    with torch.no_grad():
        expected, graphs = plain(X), []

        def backend(graph, _):
            graphs.append(sum("mmkern" in str(n.target) for n in graph.graph.nodes))
            return graph.forward

        compiled = torch.compile(plain, fullgraph=True, backend=backend)
        compiled(X)
        with integration.patched():
            torch.testing.assert_close(compiled(X), expected)
        assert graphs == [0, 3]
        for traced in (torch.jit.trace(patched, X), torch.export.export(patched, (X,)).module()):
            torch.testing.assert_close(traced(X), expected)
            code = traced.graph if isinstance(traced, torch.fx.GraphModule) else traced.inlined_graph
            assert str(code).count("mmkern") >= 3
    graph = torch.fx.symbolic_trace(integration.patch(torch.nn.Softmax(-1)))
    assert ops_of(pickle.loads(pickle.dumps(graph)), X) == ["softmax_fwd"]


def test_exceptions_threads_and_parts_leave_nothing_behind():
    before = {name: getattr(F, name) for name in OPS}
    patched = integration.patch(model())
    integration.patch(patched.layer)
    expected = model()(X)
    for call in (lambda: patched(X, twice=True), lambda: patched(X, nothing=1)):
        with pytest.raises((ZeroDivisionError, TypeError)):
            call()
    failed = []

    def work():
        for _ in range(20):
            if not torch.allclose(patched(X), expected, atol=1e-6) or ops_of(patched.layer, X) != ["attention_fwd"]:
                failed.append(1)

    for _ in range(20):
        torch.testing.assert_close(patched(X), expected)
    threads = [threading.Thread(target=lambda: [patched(X) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work()
    assert not failed
    assert {name: getattr(F, name) for name in OPS} == before
    assert ops_of(integration.unpatch(patched), X) == ["attention_fwd"]
    heir = integration.patch(model())
    heir.__class__ = type("Heir", (type(heir),), {})
    with pytest.raises(ValueError, match="its class was changed after patch"):
        integration.unpatch(heir)


def test_a_forward_of_the_instance_is_inside():
    patched = model()
    patched.forward = lambda x: F.softmax(x, dim=-1)
    assert ops_of(integration.patch(patched), X) == ["softmax_fwd"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_cannot_be_patched_is_refused():
    class Stream(torch.nn.Module):
        def forward(self, x):
            yield x

    with pytest.raises(ValueError, match=r"Stream\.forward runs after the call"):
        integration.patch(Stream())
    with pytest.raises(ValueError, match="TorchScript"):
        integration.patch(torch.jit.trace(torch.nn.Softmax(-1), X))


# ---- Who else sees a call


class Watcher(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Watched(torch.Tensor):
    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_function_modes_and_subclasses_see_the_call():
    theirs = {name: getattr(F, name) for name in ("scaled_dot_product_attention", "softmax", "cross_entropy")}
    x = mmkern.testing.randn(2, 5, 8)
    calls = {
        "scaled_dot_product_attention": lambda t: F.scaled_dot_product_attention(t, key=x, value=x),
        "softmax": lambda t: F.softmax(t, dim=-1),
        "cross_entropy": lambda t: F.cross_entropy(t.flatten(0, 1), torch.arange(10) % 8),
    }
    for name, call in calls.items():
        expected = call(x)
        with integration.patched(), Watcher() as watcher, torch.device("cpu"):
            assert [op.split("_")[0] for op in ops_of(call, x)] == [name.split("_")[0].replace("scaled", "attention")]
        assert theirs[name] in watcher.seen
        assert {theirs[name]: 1}[next(f for f in watcher.seen if f == theirs[name])] == 1
        Watched.seen.clear()
        with integration.patched():
            found = call(x.as_subclass(Watched))
        assert type(found) is Watched
        assert theirs[name] in Watched.seen
        torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")  # torch's, of a prototype
def test_nested_and_other_tensors_stay_with_torch():
    parts = [mmkern.testing.randn(length, 2, 8, seed=length) for length in (3, 5)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    packed = torch.nested.nested_tensor([t.transpose(0, 1) for t in parts])
    mkldnn = mmkern.testing.randn(2, 3).to_mkldnn()
    calls = [
        lambda: F.scaled_dot_product_attention(jagged, jagged, jagged).values(),
        lambda: F.scaled_dot_product_attention(packed, packed, packed).to_padded_tensor(0.0),
        lambda: F.softmax(packed, -1).to_padded_tensor(0.0),
        lambda: F.softmax(mkldnn, -1).to_dense(),
    ]
    for call in calls:
        expected = call()
        with integration.patched():
            assert torch.equal(call(), expected)


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_causal_biases_of_torch(bias):
    q, k, v = (mmkern.testing.randn(1, 2, n, 8, seed=i) for i, n in enumerate((3, 5, 5)))

    def call(**more):
        return F.scaled_dot_product_attention(q, k, v, bias(3, 5), **more)

    expected = call()
    with integration.patched():
        assert ops_of(call) == ["attention_fwd"]
        torch.testing.assert_close(call(), expected)
        assert call().view(2, 3, 8).shape == (2, 3, 8)
        with pytest.raises(ValueError, match="is_causal: a CausalBias"):
            call(is_causal=True)
