"""A function that is computed again takes the selections of its first run."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa_hf.kernels import choosing_once, recomputation
from nsa_hf.kernels.recomputation import chosen_before, keep_chosen

CHECKPOINTS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "in one of Transformers'": partial(choosing_once(checkpoint), use_reentrant=False),
}


class Chooser:
    """Chooses a place of a row by counting how often it was asked, as an operator would."""

    def __init__(self) -> None:
        self.chosen: list[int] = []
        self.taken: list[int] = []

    def __call__(self, shape: tuple[int, ...] = (1,)) -> Tensor:
        selection = chosen_before(shape)
        if selection is None:
            self.chosen.append(len(self.chosen) + len(self.taken))
            selection = torch.full(shape, self.chosen[-1])
            keep_chosen(selection)
        else:
            self.taken.append(int(selection.flatten()[0]))
        place = int(selection.flatten()[0])
        selection.fill_(-1)  # as compiled code may, once it is used
        return torch.tensor(place)


def layer(choose: Chooser, times: int, x: Tensor) -> Tensor:
    for _ in range(times):
        x = x * (1 + x[..., choose()])
    return x


@pytest.mark.parametrize("checkpointing", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("times", [1, 3])
def test_a_function_chooses_once(checkpointing: Callable, times: int) -> None:
    gradients = []
    for checkpoint_once in (lambda function, x: function(x), choosing_once(checkpointing)):
        choose, x = Chooser(), torch.linspace(1, 2, 24).requires_grad_()
        y = x
        for _ in range(2):
            y = checkpoint_once(partial(layer, choose, times), y)
        y.sum().backward()
        gradients.append(x.grad)
        assert choose.chosen == list(range(2 * times))
    assert torch.equal(*gradients)
    assert choose.taken == [*range(times, 2 * times), *range(times)]  # the last function is computed again first


def test_a_graph_that_is_kept_is_computed_again_twice() -> None:
    choose, x = Chooser(), torch.linspace(1, 2, 8).requires_grad_()
    out = choosing_once(CHECKPOINTS["not reentrant"])(partial(layer, choose, 2), x).sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and choose.chosen == [0, 1] and choose.taken == [0, 1] * 2


def test_nothing_is_kept_where_nothing_is_checkpointed() -> None:
    choose = Chooser()
    choosing_once(CHECKPOINTS["not reentrant"])(partial(layer, choose, 1), torch.ones(8, requires_grad=True))
    choose()
    CHECKPOINTS["not reentrant"](partial(layer, choose, 1), torch.ones(8, requires_grad=True)).sum().backward()
    assert choose.chosen == [0, 1, 2, 3] and not choose.taken


def test_an_error_ends_it_too() -> None:
    choose = Chooser()

    def fail(x: Tensor) -> Tensor:
        choose()
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        choosing_once(checkpoint)(fail, torch.ones(1, requires_grad=True), use_reentrant=False)
    assert recomputation.current.kept is None


def test_threads_have_their_own() -> None:
    choose, other = Chooser(), Chooser()

    def function(x: Tensor) -> Tensor:
        if not other.chosen:
            choose()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return x.exp()

    choosing_once(checkpoint)(function, torch.ones(1, requires_grad=True), use_reentrant=False).sum().backward()
    assert choose.chosen == [0] and other.chosen == [0, 1] and not other.taken


def test_another_selection_the_second_time_is_an_error() -> None:
    choose, shapes = Chooser(), iter([(1,), (2,)])

    def function(x: Tensor) -> Tensor:
        return x * (1 + x[..., choose(next(shapes))])

    out = choosing_once(checkpoint)(function, torch.ones(8, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"a selection of shape \[2\], and had one of \[1\] in its first"):
        out.sum().backward()


def test_compiled_around_it_is_the_function_itself() -> None:
    """Where checkpointing is within what is compiled, it may not be told from PyTorch's."""
    x = torch.linspace(1, 2, 8)

    def checkpointing(function: Callable, x: Tensor) -> Tensor:
        return function(x) if function is torch.exp else x

    def function(x: Tensor) -> Tensor:
        return choosing_once(checkpointing)(torch.exp, x)

    torch.testing.assert_close(torch.compile(function, backend="eager", fullgraph=True)(x), x.exp())
    assert torch.equal(function(x), x)


def test_after_an_inner_function_the_outer_one_goes_on() -> None:
    checkpointing = choosing_once(CHECKPOINTS["not reentrant"])
    gradients = []
    for checkpoint_once in (lambda function, x: function(x), checkpointing):
        choose, x = Chooser(), torch.linspace(1, 2, 24).requires_grad_()

        def function(x: Tensor, choose: Chooser = choose) -> Tensor:
            return layer(choose, 1, checkpointing(torch.exp, layer(choose, 1, x)))

        checkpoint_once(function, x).sum().backward()
        gradients.append(x.grad)
        assert choose.chosen == [0, 1]
    assert torch.equal(*gradients) and choose.taken == [0, 1]


@pytest.mark.parametrize("graphs", [(True, False), (False, True)], ids=["forward", "backward"])
def test_what_becomes_a_graph_chooses_by_itself(graphs: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    choose, x = Chooser(), torch.ones(8, requires_grad=True)
    forward, backward = (lambda selection, graph=graph: graph for graph in graphs)
    monkeypatch.setattr(recomputation, "in_graph", forward)
    out = choosing_once(CHECKPOINTS["not reentrant"])(partial(layer, choose, 1), x).sum()
    monkeypatch.setattr(recomputation, "in_graph", backward)
    out.backward()
    assert choose.chosen == [0, 1] and not choose.taken


def test_it_can_be_pickled() -> None:
    copied = pickle.loads(pickle.dumps(choosing_once(CHECKPOINTS["not reentrant"])))
    choose, x = Chooser(), torch.ones(8, requires_grad=True)
    copied(partial(layer, choose, 1), x).sum().backward()
    assert choose.chosen == choose.taken == [0]
