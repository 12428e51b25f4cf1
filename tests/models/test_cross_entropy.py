"""Cross-entropy of tokens: equal to PyTorch's, whatever the blocks, and keeps the logits alone."""

import pytest
import torch
from torch.nn import functional as F

from hf_vlm.models import losses as cross_entropy
from hf_vlm.models.losses import token_cross_entropy

TOKENS, VOCABULARY = 11, 37
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (scale * torch.randn(TOKENS, VOCABULARY)).to(dtype).requires_grad_()
    return logits, torch.randint(VOCABULARY, (TOKENS,))


def pytorch(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)


@pytest.mark.parametrize("rows", [1, 4, TOKENS, 2 * TOKENS])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_pytorch(dtype, label_smoothing, rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values to fp32's rounding, gradients to that of the logits' own type."""
    monkeypatch.setattr(cross_entropy, "LOGITS_PER_BLOCK", rows * VOCABULARY)
    logits, targets = make(dtype)
    weights = torch.randn(TOKENS)
    results = []
    for function in (token_cross_entropy, pytorch):
        losses = function(logits, targets, label_smoothing)
        results.append((losses, *torch.autograd.grad((losses * weights).sum(), logits)))
    (losses, gradient), (expected, expected_gradient) = results
    assert (losses.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2 * rounding, atol=rounding * 1e-2)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_as_exact_as_pytorch(offset) -> None:
    """Large logits neither overflow nor cost digits; some of the words are certain."""
    logits, targets = make()
    with torch.no_grad():
        logits += offset
        logits[:3].scatter_add_(1, targets[:3, None], torch.full((3, 1), 10.0))
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    losses = token_cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", [0, 5], ids=["another", "itself"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_words_that_cannot_come(label_smoothing, target) -> None:
    """A logit of minus infinity has probability 0."""
    logits, _ = make()
    with torch.no_grad():
        logits[:, 5] = -torch.inf
    targets = torch.full((TOKENS,), target)
    results = []
    for function in (token_cross_entropy, pytorch):
        losses = function(logits, targets, label_smoothing)
        results.append((losses, *torch.autograd.grad(losses.sum(), logits)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", [-100, VOCABULARY])
def test_targets_are_of_the_vocabulary(target) -> None:
    logits, targets = make()
    targets[3] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_cross_entropy(logits, targets)


def test_no_tokens() -> None:
    logits = torch.randn(0, VOCABULARY, requires_grad=True)
    total = token_cross_entropy(logits, torch.empty(0, dtype=torch.long)).sum()
    total.backward()
    assert total == 0
    assert logits.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backward_keeps_the_logits_alone(dtype) -> None:
    """Of their own type, and the targets; PyTorch's keeps fp32."""
    logits, targets = make(dtype)

    def bytes_kept(function) -> int:
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            function(logits, targets, 0.0)
        return sum(kept.values())

    assert bytes_kept(token_cross_entropy) <= logits.nbytes + targets.nbytes
    assert bytes_kept(pytorch) >= 4 * logits.numel()


def test_logits_stay_as_they_are() -> None:
    """A head may need its own result in the backward pass, as tanh does."""
    logits, targets = make()
    capped = 5 * torch.tanh(logits)
    before = capped.detach().clone()
    (gradient,) = torch.autograd.grad(token_cross_entropy(capped, targets).sum(), logits)
    assert torch.equal(capped, before)
    (expected,) = torch.autograd.grad(pytorch(5 * torch.tanh(logits), targets, 0.0).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
