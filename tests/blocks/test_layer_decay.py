import torch

from limbeck import networks
from limbeck.adapters.patch_tokens import patch_encoder
from limbeck.blocks.layer_decay import decay_groups, layer_decay_groups
from limbeck.core.optim import TrainingConfig, make_optimised


def test_rates_fall_towards_the_input() -> None:
    model = networks.build("maevit-d8-l3-h2-p4", in_shape=(1, 8, 8), num_classes=3)
    encoder = patch_encoder(model)
    groups = layer_decay_groups(encoder, model.head.parameters(), lr=1.0, decay=0.5, weight_decay=0.1)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    blocks = list(encoder.blocks)
    for number, expected in enumerate((0.125, 0.25, 0.5)):
        assert {rate[id(p)] for p in blocks[number].parameters()} == {expected}
    assert rate[id(model.vit.embeddings.cls_token)] == 0.5**4 and rate[id(model.head.weight)] == 1.0
    assert rate[id(model.vit.layernorm.weight)] == 1.0
    assert decay[id(model.head.weight)] == 0.1 and decay[id(model.head.bias)] == 0
    assert decay[id(model.vit.embeddings.cls_token)] == 0
    assert id(model.vit.embeddings.position_embeddings) not in rate  # frozen
    flat = [id(p) for g in groups for p in g["params"]]
    assert len(flat) == len(set(flat))


def test_the_schedule_scales_every_groups_rate() -> None:
    model = networks.build("maevit-d8-l2-h2-p4", in_shape=(1, 8, 8), num_classes=3)
    groups = layer_decay_groups(patch_encoder(model), model.head.parameters(), lr=1e-2, decay=0.5, weight_decay=0.1)
    made = make_optimised(groups, TrainingConfig(schedule="linear", betas=(0.8, 0.9)), 10)
    before = [g["lr"] for g in made.optimizer.param_groups]
    for _ in range(5):
        made.optimizer.step()
        made.scheduler.step()
    assert [g["lr"] for g in made.optimizer.param_groups] == [v / 2 for v in before]
    assert {g["betas"] for g in made.optimizer.param_groups} == {(0.8, 0.9)}


def test_two_groups_by_shape() -> None:
    layer = torch.nn.Linear(3, 2)
    matrices, vectors = decay_groups(layer.parameters(), 0.3)
    assert matrices["params"] == [layer.weight] and matrices["weight_decay"] == 0.3
    assert vectors["params"] == [layer.bias] and vectors["weight_decay"] == 0
