"""Ways to compute the same thing that are not torch's usual ones: what is installed, and what they are given.

Each is built on the very tensors that ours reads, with as many threads, and without threads that spin between calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util

import torch
from torch import Tensor

from mmkern.benchmarks.records import Baseline, Call, Case, Problem
from mmkern.ops.dispatch import _C

EXTRA = "pip install 'mmkern[rivals]'"


@dataclass(frozen=True)
class Rival:
    """packages: what has to be importable. builds: makes the call for a case; takes: which cases it can do."""

    packages: tuple[str, ...]
    takes: Callable[[Case, Problem, str], bool]
    build: Callable[[Case, Problem], Call]
    needs: Callable[[], str] = lambda: ""

    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        absent = [p for p in self.packages if util.find_spec(p) is None]
        return f"not installed ({', '.join(absent)}): {EXTRA}" if absent else self.needs()


def _forward(case: Case, problem: Problem, device: str) -> bool:
    return problem.kind == "forward" and not problem.reuses


def _plain_attention(case: Case, problem: Problem, device: str) -> bool:
    """Attention without a mask, as many key heads as query heads."""
    if case.op not in ("attention", "attention-causal", "attention-decode"):
        return False
    q, k = problem.inputs[:2]
    return q.size(1) == k.size(1)


def _attention_on_cpu(case: Case, problem: Problem, device: str) -> bool:
    return device == "cpu" and case.dtype == torch.float32 and _plain_attention(case, problem, device)


def _compiled(case: Case, problem: Problem, backend: str = "inductor") -> Call:
    return torch.compile(problem.baselines[0].call, dynamic=False, backend=backend)


def _flex(case: Case, problem: Problem) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = problem.inputs[:3]
    visible = None
    if case.op == "attention-causal":
        lengths = q.size(2), k.size(2)
        visible = create_block_mask(lambda b, h, i, j: i >= j, None, None, *lengths, device=str(q.device))
    return partial(torch.compile(flex_attention, dynamic=False), q, k, v, block_mask=visible)


def _rows(x: Tensor) -> Tensor:
    """(batch, length, heads * width) of (batch, heads, length, width), in the memory that x has."""
    rows = x.transpose(1, 2)
    return rows.view(*rows.shape[:2], -1)


def _onnxruntime(case: Case, problem: Problem) -> Call:
    """Its fused attention operator on float32, in a graph of one node."""
    import onnx
    import onnxruntime

    q = problem.inputs[0]
    given = dict(zip(("query", "key", "value"), map(_rows, problem.inputs[:3]), strict=True))
    options = {"num_heads": q.size(1), "unidirectional": int(case.op == "attention-causal")}
    node = onnx.helper.make_node("MultiHeadAttention", [*given], ["out"], domain="com.microsoft", **options)
    float32 = onnx.TensorProto.FLOAT
    ends = [onnx.helper.make_tensor_value_info(name, float32, list(t.shape)) for name, t in given.items()]
    out = onnx.helper.make_tensor_value_info("out", float32, list(given["query"].shape))
    sets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "attention", ends, [out]), opset_imports=sets)
    model.ir_version = 8  # older runtimes read it too
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    feeds = {name: t.numpy() for name, t in given.items()}
    shape = q.size(0), q.size(2), q.size(1), q.size(3)
    return lambda: torch.from_numpy(session.run(None, feeds)[0]).view(shape).transpose(1, 2)


def _openvino(case: Case, problem: Problem) -> Call:
    """Its attention operator in float32; it reads (batch, length, heads, width), as the tensors lie in memory."""
    import openvino
    from openvino import opset13 as ops

    given = [t.transpose(1, 2).numpy() for t in problem.inputs[:3]]
    ends = [ops.parameter(list(t.shape), openvino.Type.f32) for t in given]
    heads = [ops.transpose(end, ops.constant([0, 2, 1, 3])) for end in ends]
    node = ops.scaled_dot_product_attention(*heads, causal=case.op == "attention-causal")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(openvino.Model([node], ends, "attention"), "CPU", settings)
    request, feeds = compiled.create_infer_request(), dict(enumerate(given))
    return lambda: torch.from_numpy(request.infer(feeds, share_inputs=True)[0])


def _no_avx512() -> str:
    fast = bool(_C) and any(isa.startswith("avx512") for isa in _C.isas())
    return "" if fast else "without AVX-512 it calls torch's own kernel"


RIVALS = {
    "torch.compile": Rival((), _forward, _compiled),
    "flexattention": Rival((), _plain_attention, _flex),
    "onnxruntime": Rival(("onnxruntime", "onnx"), _attention_on_cpu, _onnxruntime),
    "openvino": Rival(("openvino",), _attention_on_cpu, _openvino),
    "zentorch": Rival(("zentorch",), _forward, partial(_compiled, backend="zentorch"), _no_avx512),
}


def chosen(names: Sequence[str], device: str) -> list[str]:
    """The rivals of these names; "all" are those that are installed.

    Raises:
        ValueError: a name that there is none of, or one that cannot run here.
    """
    if list(names) == ["all"]:
        return [name for name, rival in RIVALS.items() if not rival.missing()]
    for name in names:
        if name not in RIVALS:
            raise ValueError(f"no such rival: {name!r}; choose from all, {', '.join(RIVALS)}")
        if missing := RIVALS[name].missing():
            raise ValueError(f"{name}: {missing}")
    return list(names)


def states(asked: Sequence[str] = ()) -> dict[str, str]:
    """Of every rival its version and a hash of its files, or why it was not asked."""
    found = {}
    for name, rival in RIVALS.items():
        what = ", ".join(map(_version, rival.packages or ("torch",)))
        found[name] = rival.missing() or (what if name in asked else f"{what}; not asked: --rivals {name}")
    return found


def _version(package: str) -> str:
    """ "1.2.3 (sha256 of its list of files)": two builds of one version differ."""
    try:
        installed = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return package
    record = hashlib.sha256((installed.read_text("RECORD") or "").encode()).hexdigest()[:12]
    return f"{package} {installed.version} ({record})"


def baselines(names: Sequence[str], case: Case, problem: Problem, device: str) -> list[Baseline]:
    """The named rivals that can do a case, built when first called: one that cannot be built says why."""
    able = [name for name in names if RIVALS[name].takes(case, problem, device)]
    calls = {name: _WhenCalled(partial(RIVALS[name].build, case, problem)) for name in able}
    return [Baseline(name, call, prepare=call) for name, call in calls.items()]


class _WhenCalled:
    """A call that is made when it is first called."""

    def __init__(self, build: Callable[[], Call]) -> None:
        self.build = build
        self.call: Call | None = None

    def __call__(self) -> Tensor:
        if self.call is None:
            self.call = self.build()
        return self.call()
