from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from limbeck.blocks.taps import Tap, TapInfo, Taps, format_taps, list_taps, unwrap
from limbeck.core.errors import InputError, LimbeckError, UnknownNameError


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.conv1(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer2 = nn.Sequential(Block(), Block())
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(12)])
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x))).mean((2, 3))
        for block in self.blocks:
            x = block(x)
        return self.fc(x)


class Function(nn.Module):
    """A layer with a given forward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


# --- what is captured ---


def test_same_tensors_as_a_manual_forward(net: Net, x: Tensor) -> None:
    net.eval()
    with Taps(net, ["stem", "layer1", "layer1.0.conv1", Tap("fc", io="input"), "."]) as features:
        out = net(x)
    stem = net.stem(x)
    layer1 = net.layer1(stem)
    pooled = net.layer2(layer1).mean((2, 3))
    for block in net.blocks:
        pooled = block(pooled)
    assert torch.equal(features["stem"], stem)
    assert torch.equal(features["layer1"], layer1)
    assert torch.equal(features["layer1.0.conv1"], net.layer1[0].conv1(stem))
    assert torch.equal(features["fc"], pooled)
    assert features["."] is out
    assert list(features) == ["stem", "layer1", "layer1.0.conv1", "fc", "."]
    assert len(features) == 5 and "stem" in features and "layer2" not in features


def test_captured_tensors_carry_the_graph(net: Net, x: Tensor) -> None:
    with Taps(net, "layer1") as features:
        net(x)
    features["layer1"].square().sum().backward()
    assert net.layer1[1].conv2.weight.grad.abs().sum() > 0
    assert net.layer2[0].conv1.weight.grad is None


def test_taps_do_not_change_the_output(net: Net, x: Tensor) -> None:
    net.eval()
    expected = net(x)
    with Taps(net, ["**"]) as features:
        out = net(x)
    assert torch.equal(out, expected)
    assert len(features) == len([m for m in net.modules() if not isinstance(m, nn.ModuleList)]) - 1


def test_entered_again_and_again(net: Net, x: Tensor) -> None:
    taps = Taps(net, ["layer1"])
    with taps as first:
        net(x)
    with taps as second:
        net(2 * x)
        with taps as inner:  # also while open
            net(3 * x)
    assert not torch.equal(first["layer1"], second["layer1"])
    assert torch.equal(inner["layer1"], second["layer1"])  # the outer entry saw the last call too
    assert hooks(net) == 0


def test_read_before_the_forward(net: Net, x: Tensor) -> None:
    with Taps(net, ["layer1"]) as features:
        with pytest.raises(InputError, match="'layer1' has captured nothing yet"):
            features["layer1"]
        net(x)
        assert features["layer1"].shape == (2, 4, 6, 6)


def test_shared_module_called_twice_gives_both(x: Tensor) -> None:
    shared = nn.Conv2d(3, 3, 1)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = shared
            self.b = shared

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Twice()
    taps = [Tap("a", call="all"), Tap("a", call=0), Tap("a", call=1), Tap("a", call=-2), "a", "b"]
    with Taps(model, taps) as features:
        model(x)
    one, two = shared(x), shared(shared(x))
    both = features[taps[0]]
    assert len(both) == 2 and torch.equal(both[0], one) and torch.equal(both[1], two)
    assert torch.equal(features[taps[1]], one) and torch.equal(features[taps[2]], two)
    assert torch.equal(features[taps[3]], one) and torch.equal(features[Tap("a")], two)
    assert torch.equal(features["b"], two)
    assert list(features) == ["a#all", "a#0", "a#1", "a#-2", "a", "b"]
    with (
        pytest.raises(InputError, match=r"nothing captured for 'a#2' \(2 calls\), 'a#-3' \(2 calls\)"),
        Taps(model, [Tap("a", call=2), Tap("a", call=-3), Tap("a", call=1)]),
    ):
        model(x)


def test_repeated_taps_count_once_and_alike_names_stay_apart(net: Net, x: Tensor) -> None:
    first, second = Tap("fc", pick=lambda y: y[:, 0]), Tap("fc", pick=lambda y: y[:, 1])
    with Taps(net, ["fc", "fc", first, second]) as features:
        out = net(x)
    assert len(features) == 3 and [v.dim() for v in features.values()] == [2, 1, 1]
    assert torch.equal(features[first], out[:, 0]) and torch.equal(features[second], out[:, 1])
    with pytest.raises(UnknownNameError, match="unknown tap 'fd'; did you mean fc"):
        features["fd"]


def test_no_taps_are_allowed(net: Net, x: Tensor) -> None:
    with Taps(net, []) as features:
        net(x)
    assert len(features) == 0


# --- containers ---


@dataclass
class Output:
    loss: float
    logits: Tensor


class Pair(NamedTuple):
    hidden: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    ("make", "picks"),
    [
        (lambda a, b: (a, b), {None: 0, 0: 0, 1: 1, -1: 1}),
        (lambda a, b: [a, b], {None: 0, 1: 1}),
        (lambda a, b: {"feat": a, "logits": b}, {None: 0, "feat": 0, "logits": 1, 1: 1}),
        (lambda a, b: OrderedDict(n=3, feat=a, logits=b), {None: 0, "logits": 1, 2: 1}),
        (lambda a, b: Output(0.5, b), {None: 1, "logits": 1, 1: 1}),
        (lambda a, b: Pair(a, b), {None: 0, "logits": 1, "hidden": 0}),
        (lambda a, b: {"none": None, "deep": (b, a)}, {None: 1}),
    ],
)
def test_containers(make: Callable[[Tensor, Tensor], Any], picks: dict[Any, int]) -> None:
    parts = (torch.ones(2), torch.zeros(3))
    model = Function(lambda: make(*parts))
    for pick, expected in picks.items():
        with Taps(model, Tap(".", pick=pick)) as features:
            model()
        assert features["."] is parts[expected]
    with Taps(model, Tap("", pick=lambda out: parts[1] * 2)) as features:
        model()
    assert torch.equal(features[""], parts[1] * 2)


def test_huggingface_output_without_edits() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    states = tuple(torch.full((1, 2, 3), float(i)) for i in range(3))
    model = Function(lambda: outputs.BaseModelOutput(last_hidden_state=states[2], hidden_states=states))
    taps = [Tap("."), Tap(".", pick="last_hidden_state"), Tap(".", pick=lambda out: out.hidden_states[1])]
    with Taps(model, taps) as features:
        model()
    assert features[taps[0]] is states[2] and features[taps[1]] is states[2] and features[taps[2]] is states[1]


@pytest.mark.parametrize(
    ("value", "pick", "message"),
    [
        ({"a": torch.ones(1)}, "b", r"pick='b' is not in a dict\(a\)"),
        ((torch.ones(1),), 1, "pick=1 is not in a tuple of 1"),
        (torch.ones(2), 0, "gives one tensor, so pick=0 has nothing to choose"),
        ((1, "text"), None, "got a NoneType out of a tuple of 2 where a tensor is needed"),
        ({"a": 3}, "a", "got a int"),
        (torch.ones(2), lambda out: out.shape, "got a Size"),
    ],
)
def test_bad_pick(value: Any, pick: Any, message: str) -> None:
    model = Function(lambda: value)
    with pytest.raises(InputError, match=message), Taps(model, Tap(".", pick=pick)):
        model()
    assert hooks(model) == 0


def test_inputs_by_place_name_and_callable() -> None:
    class Inner(nn.Module):
        def forward(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
            return query + key

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, 2 * x, mask=3 * x)

    model, x = Outer(), torch.ones(2)
    values = {None: 1, 0: 1, 1: 2, "key": 2, "mask": 3}
    taps = {pick: Tap("inner", io="input", pick=pick) for pick in values}
    summed = Tap("inner", io="input", pick=lambda query, key, mask: query + key + mask)
    with Taps(model, [*taps.values(), summed]) as features:
        model(x)
    assert {pick: features[tap][0].item() for pick, tap in taps.items()} == values
    assert features[summed][0] == 6
    with pytest.raises(InputError, match="pick='value' is not in"), Taps(model, Tap("inner", io="input", pick="value")):
        model(x)


# --- paths ---


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("blocks[11]", ["blocks.11"]),
        ("layer*", ["layer1", "layer2"]),
        ("layer*.0", ["layer1.0", "layer2.0"]),
        ("layer?.1.conv*", ["layer1.1.conv1", "layer1.1.conv2", "layer2.1.conv1", "layer2.1.conv2"]),
        ("blocks.*", [f"blocks.{i}" for i in range(12)]),
        ("stem.*", ["stem.0", "stem.1", "stem.2"]),
        ("**.act", ["layer1.0.act", "layer1.1.act", "layer2.0.act", "layer2.1.act"]),
        ("**.fc", ["fc"]),
        ("layer1.**.conv1", ["layer1.0.conv1", "layer1.1.conv1"]),
        ("layer1[0].**", ["layer1.0.conv1", "layer1.0.act", "layer1.0.conv2"]),
        ("*", ["stem", "layer1", "layer2", "fc"]),  # not blocks: a ModuleList is never called
        ("", [""]),
        (".", [""]),
    ],
)
def test_paths(net: Net, path: str, expected: list[str]) -> None:
    assert [tap.path for tap in Taps(net, path).taps] == expected


def test_a_path_is_found_as_it_was_written(net: Net, x: Tensor) -> None:
    with Taps(net, [Tap("blocks[3]"), "."]) as features:
        net(x)
    assert features["blocks[3]"] is features["blocks.3"] is features[Tap("blocks[3]")]
    assert features[""] is features["."]


def test_module_dict_key() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({"a": nn.Linear(2, 2)})

        def forward(self, x: Tensor) -> Tensor:
            return self.heads["a"](x)

    assert Taps(Heads(), "heads['a']").taps == (Tap("heads.a"),)


def test_wrong_path_names_the_nearest(net: Net) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown layer 'layer1\.0\.conv3'; did you mean") as caught:
        Taps(net, ["layer1.0.conv3"])
    assert "layer1.0.conv1" in caught.value.near and "list_taps" in str(caught.value)
    with pytest.raises(UnknownNameError, match=r"did you mean layer[12] or layer[12]"):
        Taps(net, ["layer"])
    with pytest.raises(InputError, match=r"pattern 'layers\*\.0' matches no layer; near it are layer[12]\.0"):
        Taps(net, ["layers*.0"])


def test_containers_that_are_never_called(net: Net) -> None:
    with pytest.raises(
        InputError, match=r"layer 'blocks' is a ModuleList, never called itself: tap its children, 'blocks\.0'"
    ):
        Taps(net, ["blocks"])
    with pytest.raises(InputError, match=r"only containers .*\(blocks\)"):
        Taps(net, ["bl*"])


@pytest.mark.parametrize(
    "fields",
    [
        {"path": 3},
        {"path": "fc", "io": "both"},
        {"path": "fc", "call": "last"},
        {"path": "fc", "call": True},
        {"path": "fc", "pick": 1.5},
    ],
)
def test_bad_tap(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Tap(**fields)


def test_wrappers_resolve_as_if_unwrapped(net: Net, x: Tensor) -> None:
    parallel = nn.DataParallel(net)
    compiled = torch.compile(net, backend="eager")
    assert unwrap(parallel) is unwrap(compiled) is unwrap(net) is net
    with Taps(parallel, ["layer1.0"]) as features:
        net(x)
    assert features["layer1.0"].shape == (2, 4, 6, 6)
    net.layer1 = torch.compile(net.layer1, backend="eager")  # inside the model
    assert [t.path for t in Taps(net, ["layer1.0.act", "layer1._orig_mod.1"]).taps] == ["layer1.0.act", "layer1.1"]


# --- safety ---


def test_hooks_are_removed_and_inplace_restored(net: Net, x: Tensor) -> None:
    inplace = {name for name, m in net.named_modules() if getattr(m, "inplace", False)}
    assert len(inplace) == 5
    with Taps(net, ["layer1", Tap("fc", io="input")]):
        assert hooks(net) == 3
        assert not any(getattr(m, "inplace", False) for m in net.modules())
        net(x)
    assert hooks(net) == 0
    assert {name for name, m in net.named_modules() if getattr(m, "inplace", False)} == inplace


def test_exception_inside_forward_leaves_no_hook(net: Net, x: Tensor) -> None:
    taps = Taps(net, ["layer1", "fc"])  # fc captures nothing, but the first error is the one to see
    with pytest.raises(RuntimeError, match="channels"), taps:
        net(x[:, :2])
    assert hooks(net) == 0 and net.stem[2].inplace
    with taps as features:
        net(x)
    assert features["fc"].shape == (2, 5)


def test_inplace_activation_does_not_overwrite(net: Net, x: Tensor) -> None:
    with Taps(net, ["layer1.0.conv1"]) as features:
        net(x)
    assert (features["layer1.0.conv1"] < 0).any()


def test_overwritten_tensor_is_an_error_and_clone_mends_it(x: Tensor) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            out += x
            return F.relu_(out)

    model = Residual()
    with (
        pytest.raises(InputError, match=r"captured for 'conv' was modified in place afterwards.*clone=True"),
        Taps(model, "conv"),
    ):
        model(x)
    with Taps(model, "conv", clone=True) as features:
        model(x)
    assert torch.equal(features["conv"], model.conv(x))
    features["conv"].sum().backward()
    assert model.conv.weight.grad.abs().sum() > 0
    with torch.inference_mode(), Taps(model, ".") as features:  # inference tensors count no versions
        model(x)
    assert features["."].is_inference()


def test_layer_that_is_not_called(net: Net, x: Tensor) -> None:
    net.unused = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"nothing captured for 'unused' \(0 calls\)"), Taps(net, ["fc", "unused"]):
        net(x)
    assert hooks(net) == 0


def test_graph_compiled_before_ignores_taps() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.ones(2, 3)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with pytest.raises(InputError, match=r"nothing captured for '0'.*unwrap\(model\)"), Taps(compiled, "0"):
        compiled(x)
    with Taps(compiled, "0") as features:
        unwrap(compiled)(x)
    assert torch.equal(features["0"], model[0](x))


def test_graph_compiled_with_open_taps() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)), torch.ones(2, 3)
    compiled = torch.compile(model, backend="eager")
    taps = Taps(compiled, ["0", "1"])
    for scale in range(12):  # more than the compiler's limit of recompilations
        with taps as features:
            compiled(scale * x)
        assert torch.equal(features["0"], model[0](scale * x))
        assert torch.equal(features["1"], features["0"].relu())


# --- gradient checkpointing ---


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.steps = Function(lambda x: x.long())
        self.reentrant: bool | None = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.steps(x)
        if self.reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def test_checkpointing_appends_once_and_keeps_gradients() -> None:
    model, x = Checkpointed(reentrant=False), torch.ones(3, 4)
    tap = Tap("block.1", call="all")
    with Taps(model, [tap]) as features:
        out = model(x)
        (out.sum() + features["block.1"][0].square().sum()).backward()  # recomputes while the taps are open
    assert len(features["block.1"]) == 1
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.reentrant = None
    with Taps(model, [tap]) as features:
        out = model(x)
    (out.sum() + features["block.1"][0].square().sum()).backward()
    for grad, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU])
def test_checkpointing_of_inplace_activations_keeps_gradients(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    block, x = nn.Sequential(nn.Linear(4, 4), activation(inplace=True), nn.Linear(4, 4)), torch.randn(3, 4)
    grads = []
    for checkpointed in (False, True):
        with Taps(block, "0", clone=True) as features:
            out = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        block.zero_grad()
        (out.square().sum() + features["0"].square().sum()).backward()  # recomputes after the taps are closed
        grads.append([p.grad.clone() for p in block.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_reentrant_checkpointing_appends_once_outside_the_checkpoint() -> None:
    model, x = Checkpointed(reentrant=True), torch.ones(3, 4)
    with Taps(model, [Tap(".", call="all"), Tap("first", call="all"), "steps"]) as features:
        model(x).sum().backward()
    assert len(features["."]) == len(features["first"]) == 1 and features["first"][0].requires_grad


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_without_graph_is_an_error() -> None:
    model, x = Checkpointed(reentrant=True), torch.ones(3, 4)
    with (
        pytest.raises(
            InputError, match=r"tap 'block\.1' lies inside a reentrant gradient checkpoint.*use_reentrant=False"
        ),
        Taps(model, "block.1"),
    ):
        model(x)
    with pytest.raises(InputError, match="reentrant"), Taps(model, Tap("block.1", io="input")):
        model(x)
    with Taps(model, Tap("block", io="input")) as features:  # what goes into the checkpoint still has its graph
        model(x)
    assert features["block"].requires_grad
    assert hooks(model) == 0
    whole = Checkpointed(reentrant=False)
    with pytest.raises(InputError, match="reentrant"), Taps(whole, "first"):  # the root itself lies in the checkpoint
        checkpoint(whole, x, use_reentrant=True)
    with pytest.raises(InputError, match="reentrant"), Taps(whole, "block.1"):
        checkpoint(partial(whole.forward), x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_where_no_gradient_is_wanted() -> None:
    model, x = Checkpointed(reentrant=True), torch.ones(3, 4)
    with Taps(model, "block.1") as features, torch.no_grad():  # a teacher that is not frozen
        model(x)
    assert not features["block.1"].requires_grad
    model.requires_grad_(False)
    with Taps(model, ["block.1", "steps"]) as features:  # a frozen one, run with gradients on
        model.eval()(x)
    assert features["block.1"].shape == (3, 4)


def test_own_no_grad_block_and_integer_tensors_are_fine() -> None:
    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.steps = nn.Linear(4, 4), nn.Linear(4, 4), Function(lambda x: x.long())

        def forward(self, x: Tensor) -> Tensor:
            self.steps(x)
            with torch.no_grad():
                key = self.key(x)
            return self.query(x) * key

    model = Momentum()
    with Taps(model, ["query", "key", "steps"]) as features:
        model(torch.ones(3, 4))
    assert features["query"].requires_grad and not features["key"].requires_grad
    steps = nn.Sequential(nn.Linear(4, 4), Function(lambda x: x.long()))
    with Taps(steps, "1") as features:
        checkpoint(steps, torch.ones(3, 4, requires_grad=True), use_reentrant=True)
    assert features["1"].dtype == torch.int64


# --- list_taps ---


def test_list_taps(net: Net, x: Tensor) -> None:
    net.train()
    net.layer2.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    infos = list_taps(net, x)
    assert infos[0] == TapInfo(".", "Net", (2, 5), torch.float32, 1)
    by_path = {info.path: info for info in infos}
    assert by_path["layer1.0.conv2"] == TapInfo("layer1.0.conv2", "Conv2d", (2, 4, 6, 6), torch.float32, 1)
    assert "blocks" not in by_path and "blocks.11" in by_path
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert hooks(net) == 0
    assert next(i for i in list_taps(net, x, io="input") if i.path == "stem").shape == (2, 3, 6, 6)


def test_list_taps_samples_calls_and_containers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = self.alias = nn.Linear(2, 2)
            self.words = Function(lambda x: "text")
            self.noise = Function(torch.rand_like)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
            self.words(a)
            return {"n": 1, "y": self.noise(self.shared(self.shared(a)) + b).half()}

    model, a = Odd(), torch.ones(1, 2)
    state = torch.get_rng_state()
    for sample in [(a, a), {"a": a, "b": a}]:
        infos = list_taps(model, sample)
        assert infos[0] == TapInfo(".", "Odd", (1, 2), torch.float16, 1)
        assert infos[1:4] == [
            TapInfo("shared", "Linear", (1, 2), torch.float32, 2),
            TapInfo("alias", "Linear", (1, 2), torch.float32, 2),
            TapInfo("words", "Function", None, None, 1),
        ]
    assert torch.equal(torch.get_rng_state(), state)
    assert format_taps(infos).splitlines() == [
        "path    type      shape  dtype    calls",
        ".       Odd       1x2    float16  1",
        "shared  Linear    1x2    float32  2",
        "alias   Linear    1x2    float32  2",
        "words   Function  -      -        1",
        "noise   Function  1x2    float32  1",
    ]
    with pytest.raises(LimbeckError, match="io must be"):
        list_taps(model, (a, a), io="both")  # type: ignore[arg-type]


def test_list_taps_restores_after_an_error(net: Net) -> None:
    net.train()
    with pytest.raises(RuntimeError, match="channels"):
        list_taps(net, torch.ones(1, 7, 4, 4))
    assert hooks(net) == 0 and all(m.training for m in net.modules())
