import pytest
import torch
import torch.nn.functional as F

from limbeck import networks
from limbeck.blocks.ensembles import Recipe, ensemble_gradients, ensemble_logits, networks_at_once, train_ensemble
from limbeck.blocks.flat import FlatNetwork, draw_flat
from limbeck.core.errors import InputError, UnknownNameError


def build():
    return networks.build("convnet-w4-d2", in_shape=(1, 8, 8), num_classes=3)


@pytest.fixture
def made():
    torch.manual_seed(0)
    return draw_flat(build, 3)


def test_flat_network_is_the_network(made):
    network = build()
    flat = made[0].flatten(network)
    x = torch.randn(5, 1, 8, 8)
    assert torch.allclose(made[0](flat, x), network(x))
    back = made[0].write(flat)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), network.parameters(), strict=True))
    assert all(p.requires_grad for p in back.parameters())


def test_flat_vector_of_another_length(made):
    with pytest.raises(InputError, match="does not fit a network of"):
        made[0](torch.zeros(7), torch.randn(1, 1, 8, 8))
    with pytest.raises(InputError, match="other parameters"):
        made[0].flatten(networks.build("mlp-8", in_shape=(1, 8, 8), num_classes=3))
    with pytest.raises(InputError, match="no parameters"):
        FlatNetwork(torch.nn.ReLU())


def test_gradients_are_those_of_each_network_alone(made):
    network, theta = made
    x, y = torch.randn(3, 6, 1, 8, 8), torch.randint(0, 3, (3, 6))
    losses, gradient = ensemble_gradients(network, theta, x, y)
    for k in range(3):
        alone = network.write(theta[k])
        loss = F.cross_entropy(alone(x[k]), y[k])
        loss.backward()
        expected = torch.cat([p.grad.flatten() for p in alone.parameters()])
        assert torch.allclose(losses[k], loss, atol=1e-6)
        assert torch.allclose(gradient[k], expected, atol=1e-5)


def test_one_step_of_sgd_is_as_by_hand(made):
    network, theta = made
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    recipe = Recipe(steps=1, batch_size=4, lr=0.1, momentum=0.9, weight_decay=0.01, milestones=())
    trained = train_ensemble(network, theta, x, y, recipe)
    _, gradient = ensemble_gradients(network, theta, x.expand(3, -1, -1, -1, -1), y.expand(3, -1))
    assert torch.allclose(trained, theta - 0.1 * (gradient + 0.01 * theta), atol=1e-6)


def test_training_does_not_depend_on_who_trains_beside(made):
    network, theta = made
    x, y = torch.randn(20, 1, 8, 8), torch.randint(0, 3, (20,))
    recipe = Recipe(steps=5, batch_size=20, lr=0.05)
    together = train_ensemble(network, theta, x, y, recipe, seed=1)
    alone = train_ensemble(network, theta[:1], x, y, recipe, seed=1)
    assert torch.allclose(together[0], alone[0], atol=1e-5)
    assert ensemble_logits(network, together, x, 7).shape == (3, 20, 3)


def test_soft_labels_and_learning(made):
    network, theta = made
    x = torch.randn(30, 1, 8, 8)
    y = torch.randint(0, 3, (30,))
    x += y[:, None, None, None] * 2.0
    for labels in (y, F.one_hot(y, 3).float()):
        trained = train_ensemble(network, theta, x, labels, Recipe(steps=60, batch_size=10, lr=0.05))
        assert float((ensemble_logits(network, trained, x).argmax(-1) == y).float().mean()) > 0.8


def test_bad_recipes(made):
    network, theta = made
    x, y = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UnknownNameError, match="optimizer 'sdg'"):
        train_ensemble(network, theta, x, y, Recipe(1, optimizer="sdg"))
    with pytest.raises(InputError, match="no samples"):
        train_ensemble(network, theta, x[:0], y[:0], Recipe(1))
    with pytest.warns(UserWarning, match="3 of 3 networks diverged at learning rate"):
        train_ensemble(network, theta, x, y, Recipe(30, lr=1e12))


def test_taking_turns_is_the_same(made, monkeypatch):
    network, theta = made
    x, y = torch.randn(3, 6, 1, 8, 8), torch.randint(0, 3, (3, 6))
    assert networks_at_once(network, theta, x[0], 6) == 3
    monkeypatch.setattr("limbeck.blocks.ensembles.MAPPED_UP_TO", 0)
    assert networks_at_once(network, theta, x[0], 6) == 1
    together, turns = (ensemble_gradients(network, theta, x, y, at_once=n) for n in (None, 1))
    assert torch.allclose(together[0], turns[0], atol=1e-6) and torch.allclose(together[1], turns[1], atol=1e-5)


def test_batch_norm_networks_use_the_statistics_of_the_batch():
    torch.manual_seed(0)
    network, theta = draw_flat(lambda: networks.build("cnn-w4-s2", in_shape=(1, 8, 8), num_classes=3), 2)
    x = torch.randn(6, 1, 8, 8)
    again = [ensemble_logits(network, theta, x) for _ in range(2)]
    assert torch.equal(*again)  # nothing was kept from the first call
