"""EKFAC on sequences: language models, tied embeddings, positions, tokens, and draws of labels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distinfluence import EkfacInfluence, LanguageModelObjective
from distinfluence.errors import LossError, SettingError, UnsupportedOperatorError
from distinfluence.model.batch import take
from distinfluence.model.counter_random import Uniform, sample_keys
from distinfluence.model.predictive import Categorical, Dense, Independent, Predictive
from tests.influence.test_ekfac import bases, eigenvectors, in_row_order
from tests.layers.networks import TiedText, network
from tests.reference import Reference
from tests.zoo import Case


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def text(n: int = 8, **settings: Any) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TiedText(**settings).double().eval()
        ids = torch.randint(11, (n + 3, 6))
    return Case(model, next_token, (ids[:n], ids[:n]), (ids[n:], ids[n:]))


def fitted(case: Case, damping: float = 0.05, **settings: Any) -> EkfacInfluence:
    settings = {"update_diagonal": True, **settings}
    objective = LanguageModelObjective()
    influence = EkfacInfluence(case.model, hessian_regularization=damping, loss=objective, **settings)
    return influence.fit({"input_ids": case.train[0]} if _takes_names(case.model) else case.train)


def _takes_names(model: nn.Module) -> bool:
    return not isinstance(model, TiedText)


@pytest.mark.parametrize("raw_positions", [False, True])
def test_token_level_eigenvalues_are_the_diagonal_of_the_exact_matrix(raw_positions: bool) -> None:
    case = text(raw_positions=raw_positions)
    influence = fitted(case, fisher="exact")
    assert influence.fit_report.coverage == 1
    reference = Reference(case)
    exact = in_row_order(influence, reference.ggn(), reference)
    for basis in bases(influence):
        q = eigenvectors(influence, basis)
        expected = (q * (exact @ q)).sum(dim=0)
        torch.testing.assert_close(basis.values.flatten(), expected, rtol=1e-9, atol=1e-12 * float(exact.trace()))


def test_every_layer_of_a_language_model_is_recognised() -> None:
    influence = fitted(text())
    assert all(unit.uses for unit in influence.layout.units)
    by_name = influence.fit_report.treatments
    assert by_name["tokens.weight"] == "Kronecker factors 11×8, used 2 times"  # embedding and head
    assert by_name["places.weight"] == "Kronecker factors 6×8"
    assert by_name["attention.in_proj_weight"] == "Kronecker factors 24×9 with bias"
    assert by_name["mlp.0.weight"] == "Kronecker factors 16×9 with bias"
    assert by_name["norm.weight"] == "dense block of 8"


def test_influences_are_those_of_the_dense_matrix_and_of_autograd() -> None:
    case = text()
    influence = fitted(case)
    q = torch.cat([eigenvectors(influence, basis) for basis in bases(influence)], dim=1)
    dense = q * torch.cat([basis.values.flatten() for basis in bases(influence)]) @ q.T
    reference = Reference(case)
    test, train = (in_row_order(influence, reference.gradients(data), reference) for data in (case.test, case.train))
    expected = torch.linalg.solve(dense + 0.05 * torch.eye(len(dense)).double(), test.T).T @ train.T
    torch.testing.assert_close(influence.influences(*case.test, *case.train), expected, rtol=1e-8, atol=1e-9)


def test_tokens_sum_to_the_sample() -> None:
    case = text()
    influence = fitted(case)
    by_token = influence.influences_by_token(*case.test, *case.train)
    assert by_token.shape == (3, 8, 6)
    torch.testing.assert_close(by_token.sum(dim=2), influence.influences(*case.test, *case.train))


def test_a_tokens_share_is_that_of_its_positions_in_each_layer() -> None:
    # one linear layer on a sequence: the gradient of position t is δ_t a_tᵀ, by hand
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(5, 4, 3).double(), torch.randn(5, 4, 2).double()
    influence = EkfacInfluence(model, True, 0.1, loss=nn.MSELoss()).fit((x, y))
    factors = influence.influence_factors(x[:2], y[:2])
    delta = 2 * (model(x) - y).detach() / 8
    m = torch.cat([factors[:, :6].view(2, 2, 3), factors[:, 6:].view(2, 2, 1)], dim=2)
    a = torch.cat([x, torch.ones(5, 4, 1).double()], dim=2)
    expected = torch.einsum("qoi,nto,nti->qnt", m, delta, a)
    torch.testing.assert_close(influence.influences_by_token(x[:2], y[:2], x, y), expected)


def test_layers_on_pooled_positions_have_no_tokens() -> None:
    case = network("linear on a sequence")
    influence = EkfacInfluence(case.model, True, 0.1).fit(case.train)
    with pytest.raises(UnsupportedOperatorError, match=r"head\.weight.*1"):
        influence.influences_by_token(*case.test)


def test_gradients_from_autograd_have_no_tokens() -> None:
    influence = fitted(text(raw_positions=True))
    # raw positions are added as they are: recorded; an LSTM is not
    assert influence.influences_by_token(*text().test).shape == (3, 3, 6)
    case = network("a bilinear layer and an LSTM")
    with pytest.raises(UnsupportedOperatorError, match="lstm"):
        EkfacInfluence(case.model, True, 0.1).fit(case.train).influences_by_token(*case.test)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_drawn_labels_do_not_depend_on_batches(batch_size: int) -> None:
    case = text()
    batches = [tuple(take(t, i, min(i + batch_size, 8)) for t in case.train) for i in range(0, 8, batch_size)]
    whole = fitted(case, fisher="sampled", n_draws=2, seed=3)
    parts = EkfacInfluence(
        case.model, True, 0.05, loss=LanguageModelObjective(), fisher="sampled", n_draws=2, seed=3
    ).fit(batches)
    torch.testing.assert_close(
        parts.influences(*case.test, *case.train), whole.influences(*case.test, *case.train), rtol=1e-9, atol=1e-12
    )


def test_the_same_fit_twice_gives_the_same_numbers_and_another_seed_does_not() -> None:
    case = text()
    first, again, other = (fitted(case, fisher="sampled", seed=seed) for seed in (1, 1, 2))
    one = first.influences(*case.test, *case.train)
    assert torch.equal(one, again.influences(*case.test, *case.train))
    assert torch.equal(one, first.influences(*case.test, *case.train))
    assert not torch.allclose(one, other.influences(*case.test, *case.train))


def test_many_draws_come_to_the_exact_expectation() -> None:
    case = text()
    exact = torch.cat([basis.values.flatten() for basis in bases(fitted(case, fisher="exact"))])
    # the eigenbasis differs between the two fits, the trace does not; its standard error falls as 1/√(draws·samples·T)
    drawn = torch.cat([b.values.flatten() for b in bases(fitted(case, fisher="sampled", n_draws=400))])
    assert float(drawn.sum()) == pytest.approx(float(exact.sum()), rel=0.1)


def _hessians(losses: Any, outputs: Tensor) -> Tensor:
    """∇²_f ℓ of each sample, [n, m, m]."""
    found = [
        torch.autograd.functional.hessian(lambda f, i=i: losses(_with(outputs, i, f))[i], outputs[i]).reshape(
            outputs[0].numel(), -1
        )
        for i in range(outputs.shape[0])
    ]
    return torch.stack(found)


def _with(outputs: Tensor, i: int, row: Tensor) -> Tensor:
    return torch.cat([outputs[:i], row.unsqueeze(0), outputs[i + 1 :]])


def predictive_cases() -> dict[str, tuple[Predictive, Tensor]]:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 5).double(), torch.tensor([[1, 2, 0, 3], [4, -100, 1, 1], [0, 0, -100, -100]])
    objective = LanguageModelObjective(shift=False)
    batch: Any = {"input_ids": labels, "labels": labels}
    values = torch.randn(3, 4).double()
    from distinfluence import SupervisedObjective

    plain = {
        "cross-entropy": (nn.CrossEntropyLoss(), torch.randn(3, 4).double(), torch.tensor([0, 3, 2])),
        "cross-entropy by position": (nn.CrossEntropyLoss(), logits.transpose(1, 2), labels),
        "cross-entropy, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), values, torch.tensor([0, 3, 2])),
        "squared error": (nn.MSELoss(), values, torch.randn(3, 4).double()),
        "squared error, summed": (nn.MSELoss(reduction="sum"), values, torch.randn(3, 4).double()),
        "binary cross-entropy": (nn.BCEWithLogitsLoss(), values, torch.rand(3, 4).double()),
        "Huber": (nn.HuberLoss(), values, torch.zeros(3, 4).double()),
    }
    found: dict[str, tuple[Predictive, Tensor]] = {}
    for name, (loss, outputs, targets) in plain.items():
        supervised = SupervisedObjective(loss)
        pair = (torch.zeros(3, 1), targets)
        predictive = supervised.predictive(outputs, pair)
        assert predictive is not None
        found[name] = predictive, _hessians(lambda f, s=supervised, p=pair: s.losses(f, p), outputs)
    of_text = objective.predictive(logits, batch)
    found["language model"] = of_text, _hessians(lambda f: objective.losses(f, batch), logits)
    return found


@pytest.mark.parametrize("name", list(predictive_cases()))
def test_roots_make_the_hessian_of_the_loss(name: str) -> None:
    predictive, hessians = predictive_cases()[name]
    roots = predictive.roots()
    assert roots.shape[0] == predictive.n_roots
    rows = roots.flatten(2)
    torch.testing.assert_close(torch.einsum("vni,vnj->nij", rows, rows), hessians, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", list(predictive_cases()))
def test_draws_have_the_hessian_as_second_moment(name: str) -> None:
    predictive, hessians = predictive_cases()[name]
    keys = sample_keys(torch.arange(3.0))
    n = 4000
    draws = torch.stack([predictive.draw(Uniform(keys, 0, number)) for number in range(n)]).flatten(2)
    moments = torch.einsum("vni,vnj->nij", draws, draws) / n
    # six standard errors of a product of bounded variables: |v| ≤ √tr H times a number of order one
    allowed = 6 * hessians.diagonal(dim1=1, dim2=2).sum(dim=1).max() / n**0.5
    assert float((moments - hessians).abs().max()) <= float(allowed)


def test_which_predictive_distribution_is_taken() -> None:
    found = {name: type(predictive) for name, (predictive, _) in predictive_cases().items()}
    assert found["cross-entropy by position"] is found["language model"] is Categorical
    assert found["squared error"] is found["binary cross-entropy"] is Independent
    assert found["Huber"] is Dense


def test_keys_and_uniform_numbers_depend_on_content_and_seed_alone() -> None:
    batch = torch.randn(6, 3), torch.arange(6)
    keys = sample_keys(batch)
    order = torch.tensor([3, 0, 5])
    assert torch.equal(sample_keys((batch[0][order], batch[1][order])), keys[order])
    assert len(set(keys.tolist())) == 6
    assert sample_keys((batch[0], batch[1] + 1)).ne(keys).all()
    numbers = Uniform(keys, 0)(2000)
    assert torch.equal(Uniform(keys[order], 0)(2000), numbers[order])
    assert not torch.equal(Uniform(keys, 1)(2000), numbers)
    assert not torch.equal(Uniform(keys, 0, 1)(2000), numbers)
    # uniform: mean and variance within five standard errors of 12000 numbers
    assert float(numbers.mean()) == pytest.approx(0.5, abs=5 * 0.289 / 12000**0.5)
    assert float(numbers.var()) == pytest.approx(1 / 12, abs=5 * 0.0745 / 12000**0.5)
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1


def test_a_loss_without_a_known_distribution_is_fitted_empirically_or_refused() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    data = torch.randn(6, 3).double(), torch.randn(6, 2).double()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().pow(1.5).mean()

    influence = EkfacInfluence(model, True, 0.1, loss=loss).fit(data)
    assert any("empirical Fisher" in remark for remark in influence.fit_report.remarks)
    with pytest.raises(LossError, match="predictive"):
        EkfacInfluence(model, True, 0.1, loss=loss, fisher="sampled").fit(data)


def test_language_models_as_transformers_has_them() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(13, (9, 7))
    train, test = {"input_ids": ids[:6]}, {"input_ids": ids[6:]}
    influence = EkfacInfluence(model, True, 0.05, loss=LanguageModelObjective()).fit(train)
    assert influence.fit_report.coverage == 1
    assert all(unit.uses for unit in influence.layout.units), influence.fit_report
    # against gradients by plain autograd, sample by sample
    names = list(influence.risk.blocks.shapes)
    parameters = dict(model.named_parameters())

    def gradients(some: Tensor) -> Tensor:
        rows = []
        for row in some:
            loss = next_token(model(input_ids=row[None]).logits, row[None])
            parts = torch.autograd.grad(loss, [parameters[name] for name in names])
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)

    factors = influence.influence_factors(test)
    inverse = influence.kronecker_inverse()
    torch.testing.assert_close(factors, inverse.inverse(gradients(ids[6:]), 0.05), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        influence.influences(test, None, train), factors @ gradients(ids[:6]).T, rtol=1e-7, atol=1e-9
    )
    assert influence.influences_by_token(test, None, train).shape == (3, 6, 7)


def test_padding_does_not_count() -> None:
    objective = LanguageModelObjective()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
    logits = torch.randn(2, 3, 11).double()
    losses = objective.losses(logits, {"input_ids": ids, "labels": labels})
    expected = [F.cross_entropy(logits[0], ids[0, 1:]), F.cross_entropy(logits[1, :1], ids[1, 1:2])]
    torch.testing.assert_close(losses, torch.stack(expected))
    summed = LanguageModelObjective(reduction="sum").losses(logits, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(summed, torch.stack([3 * expected[0], expected[1]]))
    with pytest.raises(SettingError, match="reduction"):
        LanguageModelObjective(reduction="none")
