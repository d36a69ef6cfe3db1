"""Every architecture that a teacher may be trained on has right second derivatives.

With g(omega) the gradient of a step's taught loss, d<g, v>/d omega along u is compared with
central differences of <g, v> along u, in float64, in training mode with dropout. The two
directions keep their places: where gradients are scaled on purpose the Jacobian of g is not
symmetric.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from l2t_core.errors import UserError
from l2t_core.hypergradients.double_backward import probe, twice_differentiable
from l2t_core.losses.taught import step_loss
from l2t_core.specs import LossSpec

pytest.importorskip("fairseq")
from fairseq import utils

from l2t_fairseq.measures import sampling
from l2t_fairseq.recipe import NmtSpec
from l2t_fairseq.students.nmt import NmtStudent, build_student

EMBEDDED = "--encoder-embed-dim 8 --decoder-embed-dim 8 "
LAYERS = EMBEDDED + (
    "--encoder-layers 1 --decoder-layers 1 --encoder-ffn-embed-dim 8 --decoder-ffn-embed-dim 8 "
    "--encoder-attention-heads 2 --decoder-attention-heads 2 "
)
CELLS = EMBEDDED + "--encoder-hidden-size 8 --decoder-hidden-size 8 --decoder-out-embed-dim 8 "
CONVOLUTIONS = (
    EMBEDDED + "--decoder-out-embed-dim 8 --encoder-layers [(8,3)]*2 --decoder-layers [(8,3)]*2 "
)
KERNELS = LAYERS + (
    "--encoder-conv-dim 8 --decoder-conv-dim 8 --encoder-kernel-size-list [3] "
    "--decoder-kernel-size-list [3] "
)
ARCHITECTURES = {
    "transformer": "--arch transformer --share-all-embeddings " + LAYERS,
    "transformer, norms first": "--arch transformer --encoder-normalize-before "
    "--decoder-normalize-before --attention-dropout 0.1 " + LAYERS,
    "transformer, layer drop": "--arch transformer --encoder-layerdrop 0.4 "
    "--decoder-layerdrop 0.4 " + LAYERS.replace("layers 1", "layers 2"),
    "transformer_iwslt_de_en": "--arch transformer_iwslt_de_en "
    "--share-decoder-input-output-embed " + LAYERS,
    "transformer_wmt_en_de": "--arch transformer_wmt_en_de --share-all-embeddings " + LAYERS,
    "lstm, 1 layer (LSTM-1)": "--arch lstm --encoder-layers 1 --decoder-layers 1 " + CELLS,
    "lstm, 2 layers (LSTM-2)": "--arch lstm --encoder-layers 2 --decoder-layers 2 "
    "--encoder-bidirectional " + CELLS,
    "lstm, tied": "--arch lstm --share-all-embeddings " + CELLS,
    "lstm, no attention": "--arch lstm --decoder-attention 0 " + CELLS,
    "lstm_wiseman_iwslt_de_en": "--arch lstm_wiseman_iwslt_de_en "
    "--decoder-out-embed-dim 8 " + EMBEDDED,
    "lstm_luong_wmt_en_de": "--arch lstm_luong_wmt_en_de " + CELLS,
    "fconv": "--arch fconv " + CONVOLUTIONS,
    "fconv_iwslt_de_en": "--arch fconv_iwslt_de_en " + CONVOLUTIONS,
    "lightconv": "--arch lightconv " + KERNELS,
    "lightconv_iwslt_de_en": "--arch lightconv_iwslt_de_en " + KERNELS,
    "lightconv, dynamic": "--arch lightconv --encoder-conv-type dynamic "
    "--decoder-conv-type dynamic " + KERNELS,
}
RUN = " --dropout 0.1 --optimizer adam --lr 0.02 --max-tokens 60 "


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep fairseq from forcing float32."""
    for name in ("softmax", "log_softmax"):
        function: Callable[..., Tensor] = getattr(torch, name)
        monkeypatch.setattr(utils, name, lambda x, dim, onnx_trace=False, f=function: f(x, dim))


def make_student(prepared_toy: Path, flags: str) -> NmtStudent:
    return build_student(NmtSpec(data=str(prepared_toy), train=flags + RUN, steps=2))


def taught_loss(student: NmtStudent) -> Tensor:
    """Return a step's loss under coefficients drawn once, with the step's dropout masks."""
    torch.manual_seed(4)
    size = student.num_classes
    phi = {k: torch.rand(size, *s, dtype=torch.float64) for k, s in
           (("d", ()), ("b", ()), ("U", (2,)), ("V", (2,)))}  # fmt: skip
    log_probs, targets = student.predict(student.batch(0))
    return step_loss(LossSpec("lowrank", "softplus", rank=2), log_probs, targets, phi, 0).mean()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_candidates_have_the_same_probabilities_in_chunks_of_any_size(
    prepared_toy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Some encoders (fconv) reorder what they are given in place."""
    student = make_student(prepared_toy, ARCHITECTURES[name])
    student.reset(1)
    student.module.eval()
    ends = {"eos": student.dictionary.eos(), "pad": student.dictionary.pad()}
    net_input = student.dev.collate(student.dev.usable[:4])["net_input"]
    with torch.no_grad():
        candidates = sampling.sample(student.module, net_input, 3, 8, 5, **ends)
        whole = sampling.candidate_log_probs(student.module, net_input, candidates, **ends)
        monkeypatch.setattr(sampling, "_CHUNK", 2)
        parts = sampling.candidate_log_probs(student.module, net_input, candidates, **ends)
    torch.testing.assert_close(parts, whole)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_second_derivatives_equal_central_differences(prepared_toy: Path, name: str) -> None:
    student = make_student(prepared_toy, ARCHITECTURES[name])
    student.reset(1)
    student.module.double()
    parameters = list(student.module.parameters())
    generator = torch.Generator().manual_seed(2)
    v, u = (
        [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        for _ in range(2)
    )

    def along(gradients: tuple[Tensor | None, ...], direction: list[Tensor]) -> float:
        pairs = zip(gradients, direction, strict=True)
        return sum(float((g * d).sum()) for g, d in pairs if g is not None)

    def gradient_at(distance: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, u, strict=True):
                p.add_(distance * d)
        found = torch.autograd.grad(taught_loss(student), parameters, allow_unused=True)
        with torch.no_grad():
            for p, d in zip(parameters, u, strict=True):
                p.sub_(distance * d)
        return along(found, v)

    with twice_differentiable(student.module):
        first = torch.autograd.grad(
            taught_loss(student), parameters, create_graph=True, allow_unused=True
        )
        live = [(g, d) for g, d in zip(first, v, strict=True) if g is not None and g.requires_grad]
        second = torch.autograd.grad(
            [g for g, _ in live], parameters, [d for _, d in live], allow_unused=True
        )
        h = 1e-6  # at 1e-5 a ReLU of lightconv turns on in between under fairseq 0.12.2
        numeric = (gradient_at(h) - gradient_at(-h)) / (2 * h)
    assert abs(numeric) > 1e-6
    assert along(second, u) == pytest.approx(numeric, rel=1e-5)


@pytest.mark.parametrize("name", ["transformer", "fconv", "lightconv", "lstm, 2 layers (LSTM-2)"])
def test_the_probe_lets_them_pass(prepared_toy: Path, name: str) -> None:
    student = make_student(prepared_toy, ARCHITECTURES[name])
    student.reset(1)
    probe(student.module, lambda: student.predict(student.batch(0))[0].mean())


def test_mended_models_give_the_same_values_and_gradients(prepared_toy: Path) -> None:
    """What is mended for the teacher must be the model that fairseq trains."""
    student = make_student(prepared_toy, ARCHITECTURES["fconv"])
    student.reset(1)
    plain = student.setup.build_model(1)
    plain.load_state_dict(student.module.state_dict())
    mended, student.module = student.module, plain
    results = []
    for module in (plain, mended):
        student.module = module
        torch.manual_seed(4)
        log_probs, targets = student.predict(student.batch(0))
        loss = -log_probs.gather(1, targets.unsqueeze(1)).mean()
        results.append((loss, torch.autograd.grad(loss, list(module.parameters()))))
    torch.testing.assert_close(results[0], results[1])


class Once(torch.autograd.Function):
    """A kernel without second derivative, as fused ones are."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class Fused(nn.Module):
    """A layer that uses such a kernel."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.layer(x))


def test_a_layer_without_second_derivative_is_named_with_the_way_out(prepared_toy: Path) -> None:
    student = make_student(prepared_toy, ARCHITECTURES["transformer"])
    student.reset(1)
    layer = student.module.decoder.layers[0]
    layer.fc1 = Fused(layer.fc1)
    with pytest.raises(UserError) as caught:
        probe(student.module, lambda: student.predict(student.batch(0))[0].mean())
    said = str(caught.value)
    assert "Fused 'decoder.layers.0.fc1'" in said and "training.hvp=finite-difference" in said


def test_apex_layer_norm_becomes_torchs():
    """fairseq takes apex's beside a GPU; autograd does not see through its kernels."""
    from l2t_fairseq.students.second_order import mend_second_derivatives

    class FusedLayerNorm(torch.nn.LayerNorm):
        def forward(self, x):
            raise AssertionError("apex's kernel")

    part = FusedLayerNorm(3, eps=1e-3)
    module = mend_second_derivatives(torch.nn.Sequential(part))
    assert module[0] is part and part.eps == 1e-3
    module(torch.ones(2, 3))
