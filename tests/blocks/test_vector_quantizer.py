from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.blocks.vector_quantizer import VectorQuantizer, usage_of
from limbeck.core.errors import InputError

torch.set_num_threads(1)


def make(similarity: str = "cosine", codes: int = 6, dim: int = 3, **settings: object) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(dim, codes, similarity=similarity, **settings)  # type: ignore[arg-type]


def rows(n: int = 50, dim: int = 3) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(1))


def test_cosine_codes_move_as_the_equation_says() -> None:
    found, h = make(), rows()
    before = found.codebook.clone()
    out = found(h)
    z = h / h.norm(dim=1, keepdim=True)
    k = (z @ before.T).argmax(1)
    assert torch.equal(out.codes, k)
    for m in range(6):
        expected = before[m]
        if (k == m).any():
            mu = F.normalize(z[k == m].mean(0), dim=0)
            expected = F.normalize(0.8 * before[m] + 0.2 * mu, dim=0)
        torch.testing.assert_close(found.codebook[m], expected)
    torch.testing.assert_close(found.counts, 0.2 * torch.bincount(k, minlength=6).float())
    torch.testing.assert_close(out.commitment, 0.25 * ((before[k] - h) ** 2).mean())
    torch.testing.assert_close(out.values, before[k])


def test_euclidean_codes_are_running_means() -> None:
    found, first, second = make("euclidean"), rows(), rows().flip(1)
    codes = [found(x).codes for x in (first, second)]
    for m in range(6):
        # d (1 - d) n_1 and (1 - d) n_2 rows of each step weigh in the mean
        weights = [0.8 * (codes[0] == m).float(), (codes[1] == m).float()]
        total = sum(float(w.sum()) for w in weights)
        if total:
            mean = sum((w[:, None] * x).sum(0) for w, x in zip(weights, (first, second), strict=True)) / total
            torch.testing.assert_close(found.codebook[m], mean)


def test_unused_codes_stay_however_long() -> None:
    found = make("euclidean", decay=0.5)
    found.codebook[0] = 100.0
    for _ in range(400):  # beyond the range of float32, where 0.5^400 is 0
        found(rows())
    assert torch.equal(found.codebook[0], torch.full((3,), 100.0)) and found.counts[0] == 0
    assert torch.isfinite(found.codebook).all()


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_values_pass_their_gradient_straight_through(similarity: str) -> None:
    found, h = make(similarity), rows().requires_grad_()
    upstream = torch.randn(50, 3)
    (found(h).values * upstream).sum().backward()
    torch.testing.assert_close(h.grad, upstream)
    assert not found.codebook.requires_grad and not any(True for _ in found.parameters())


def test_commitment_pulls_rows_to_their_codes_only() -> None:
    found, h = make(), rows().requires_grad_()
    before = found.codebook.clone()
    out = found(h)
    out.commitment.backward()
    torch.testing.assert_close(h.grad, 0.25 * 2 * (h.detach() - before[out.codes]) / h.numel())


def test_in_evaluation_nothing_moves_and_values_are_codes() -> None:
    found = make(start="kmeans", refresh=1.0).eval()
    state = {k: v.clone() for k, v in found.state_dict().items()}
    out = found(rows())
    assert all(torch.equal(v, state[k]) for k, v in found.state_dict().items())
    assert torch.equal(out.values, found.codebook[out.codes])
    assert not found(rows().requires_grad_()).values.requires_grad


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_searching_in_chunks_changes_nothing(similarity: str) -> None:
    whole, parts = make(similarity, codes=37), make(similarity, codes=37, chunk=5)
    h = rows(23)
    similar = whole.similarities(h)
    expected = similar.topk(4, dim=1)
    for found in (whole, parts):
        assert torch.equal(found.nearest(h), similar.argmax(1))
        values, codes = found.top(h, 4)
        torch.testing.assert_close(values, expected.values)
        assert torch.equal(codes, expected.indices)
    if similarity == "cosine":
        torch.testing.assert_close(similar, F.cosine_similarity(h[:, None], whole.codebook[None], dim=2))
    else:
        torch.testing.assert_close(similar, -(h[:, None] - whole.codebook).norm(dim=2))


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_kmeans_finds_separate_groups(similarity: str) -> None:
    centres = 5 * torch.eye(3)
    h = (centres[:, None] + 0.01 * torch.randn(3, 20, 3, generator=torch.Generator().manual_seed(2))).reshape(-1, 3)
    found = make(similarity, codes=12, start="kmeans")
    out = found(h)
    assert (torch.cdist(out.values, h).diagonal() < 0.1).all() or similarity == "cosine"
    assert len({frozenset(out.codes[20 * g : 20 * g + 20].tolist()) for g in range(3)}) == 3
    assert not set(out.codes[:20].tolist()) & set(out.codes[20:].tolist())
    assert bool(found.started)
    assert make(similarity, codes=12, start="kmeans")(h[:5]).codes.max() < 12  # fewer rows than codes


def test_rare_codes_move_to_rows() -> None:
    found = make(refresh=0.05, codes=40)
    for _ in range(20):
        out = found(rows())
    z = F.normalize(rows(), dim=1)
    assert (found.counts >= 0.05).all()
    assert (found.codebook @ z.T).max(1).values.min() > 0.8
    fixed = make(codes=40)
    for _ in range(20):
        left = fixed(rows())
    assert len(out.codes.unique()) > len(left.codes.unique())


def test_rows_of_zeros_leave_codes_alone() -> None:
    found = make(refresh=0.1)
    before = found.codebook.clone()
    out = found(torch.zeros(4, 3))
    assert torch.equal(out.codes, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(found.codebook, before)
    h = torch.zeros(2, 3, requires_grad=True)
    found.similarities(h).sum().backward()
    assert torch.isfinite(h.grad).all()  # type: ignore[union-attr]


def test_its_state_is_all_in_buffers() -> None:
    whole = make(start="kmeans", refresh=0.3)
    torch.manual_seed(5)
    for _ in range(3):
        whole(rows())
    half = make(start="kmeans", refresh=0.3)
    torch.manual_seed(5)
    half(rows())
    resumed = make(start="kmeans", refresh=0.3)
    resumed.load_state_dict(half.state_dict())
    for _ in range(2):
        resumed(rows())
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items())


def test_usage() -> None:
    even, one = usage_of(torch.ones(8)), usage_of(torch.tensor([0.0, 3.0]))
    assert even["codes_used"] == 8 and even["code_perplexity"] == pytest.approx(8)
    assert one == {"codes_used": 1.0, "code_perplexity": pytest.approx(1)}
    found = make()
    found(rows())
    assert 1 < found.usage()["code_perplexity"] <= found.usage()["codes_used"] <= 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codes": 0}, "1 code"),
        ({"decay": 1.0}, "decay"),
        ({"similarity": "dot"}, "cosine or euclidean"),
        ({"start": "zeros"}, "kmeans"),
    ],
)
def test_wrong_numbers_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(**settings)  # type: ignore[arg-type]


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(InputError, match="3 numbers"):
        make()(torch.randn(4, 5))
    with pytest.raises(InputError, match="k is from 1"):
        make().top(rows(), 7)
