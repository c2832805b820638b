"""ZeRO's flat pieces of weights and optimizer state, taken apart and put together by parameter name."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

# The state of a parameter of two elements in DeepSpeed's compiled Adam and AdamW, named as torch's.
ADAM = {"step": torch.zeros(()), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}


class Piece(NamedTuple):
    """What a rank holds of a parameter: `length` elements of it from `first` on, in `flat` from `at` on.

    flat: a parameter of the optimizer, float32, several pieces end to end.
    """

    flat: Tensor
    at: int
    first: int
    length: int


# Of a flat tensor what is kept with it: the weights themselves, a moment, an average.
Alike = Callable[[Tensor], Tensor]


def _itself(flat: Tensor) -> Tensor:
    return flat


class Pieces:
    """The weights and the optimizer state of a model under ZeRO stage 1, 2 or 3.

    Whole tensors are put together one parameter at a time, and of each a rank keeps its rows: a checkpoint
    costs a rank its share of weights and state again, and the greatest parameter. Frozen weights are in no
    piece: DeepSpeed gathers them itself.

    Args:
        model: Whose parameters `zero` has taken over.
        zero: DeepSpeed's optimizer.
        weights: The ranks that share weights, one axis.
    """

    def __init__(self, model: nn.Module, zero: Any, stage: int, weights: DeviceMesh) -> None:
        self.model, self.zero, self.stage, self.weights = model, zero, stage, weights
        # a compiled optimizer of DeepSpeed's counts steps in Python
        self.counts = type(zero.optimizer).__module__.startswith("deepspeed.")
        self.blank = dict(ADAM) if self.counts else blank_state(zero.optimizer)

    def save(self) -> dict[str, Any]:
        """As `saved_state` gives it: the same names, shapes and dtypes under every engine."""
        whole: dict[int, Tensor] = {}
        model: dict[str, Tensor] = {}
        # a tied parameter is there under both names
        for name, x in self.model.state_dict(keep_vars=True).items():
            if not isinstance(x, nn.Parameter):
                model[name] = x
                continue
            if id(x) not in whole:
                whole[id(x)] = shared(self._gather(x), self.weights) if self.stage == 3 else x.detach()
            model[name] = whole[id(x)]
        optim = {name: self._state(p) for name, p in self.model.named_parameters() if p.requires_grad}
        return {"model": model, "optim": optim}

    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `save` gave."""
        weights = self.model.state_dict(keep_vars=True)
        for name, value in state["model"].items():
            if not isinstance(weights[name], nn.Parameter):
                weights[name].copy_(value)
        for flat in self._flats():
            self.zero.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if like.ndim else like.clone() for key, like in self.blank.items()
            }
        for name, p in self.model.named_parameters():
            if not p.requires_grad:
                self._set_frozen(p, state["model"][name])
                continue
            self._put(p, state["model"][name])
            for key, value in state["optim"][name].items():
                if self.blank[key].ndim:
                    self._put(p, value, self._kept(key))
                else:
                    self._count(key, value)
        self._spread()

    def held(self) -> dict[str, Tensor]:
        """The flat float32 weights, by their number."""
        return {str(i): flat for i, flat in enumerate(self._flats())}

    def named(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each parameter as `save` gives it, of tensors like those of `held`."""
        alike = self._alike(like)
        parameters = self.model.named_parameters()
        return {name: shared(self._gather(p, alike), self.weights) for name, p in parameters}

    def take(self, like: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
        """Fills what is like `held`."""
        alike = self._alike(like)
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                self._put(p, named[name], alike)

    def changed(self) -> None:
        """The flat weights into the model's."""
        self._spread()

    def _alike(self, like: Mapping[str, Tensor]) -> Alike:
        """What is like a flat tensor, of those that are like all of them."""
        numbers = {id(flat): name for name, flat in self.held().items()}
        return lambda flat: like[numbers[id(flat)]]

    def _kept(self, key: str) -> Alike:
        """The optimizer's state of a flat tensor."""
        return lambda flat: self.zero.optimizer.state[flat][key]

    def _state(self, p: nn.Parameter) -> dict[str, Tensor]:
        flats = list(self._flats())
        kept = self.zero.optimizer.state.get(flats[0], {})
        state = dict[str, Tensor]()
        for key, like in self.blank.items():
            if like.ndim:
                blank = torch.zeros(shape_of(p), device=p.device)
                state[key] = shared(self._gather(p, self._kept(key)) if kept else blank, self.weights)
            else:
                state[key] = torch.tensor(float(kept.get(key, like)))
        return state

    def _gather(self, p: nn.Parameter, alike: Alike = _itself) -> Tensor:
        """The whole weight, or what is like it, on every rank: all but one add zero to each element. Of a
        frozen one nothing is like it but itself.
        """
        if not p.requires_grad:
            with gathered(p):
                return p.detach().float().clone()
        whole = torch.zeros(shape_of(p), dtype=torch.float32, device=p.device)
        if (piece := self._piece(p)) is None:
            return assembled(whole, None, 0, self.weights)
        held = alike(piece.flat).detach()[piece.at : piece.at + piece.length]
        return assembled(whole, held, piece.first, self.weights)

    @torch.no_grad()
    def _put(self, p: nn.Parameter, value: Tensor, alike: Alike = _itself) -> None:
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if (piece := self._piece(p)) is not None:
            own = whole.reshape(-1)[piece.first : piece.first + piece.length]
            alike(piece.flat)[piece.at : piece.at + piece.length] = own

    @torch.no_grad()
    def _set_frozen(self, p: nn.Parameter, value: Tensor) -> None:
        """Fills a frozen weight."""
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        with gathered(p, modifier_rank=0):
            p.copy_(whole)

    def _count(self, key: str, value: Tensor) -> None:
        """What is one number for all parameters, such as the count of steps."""
        for flat in self._flats():
            self.zero.optimizer.state[flat][key] = int(value) if self.counts else value.clone()

    def _piece(self, p: nn.Parameter) -> Piece | None:
        """None: this rank holds no element of it."""
        if self.stage < 3:
            held: Any = p._hp_mapping  # type: ignore[attr-defined]
            if held is None:
                return None
            flat = self.zero.single_partition_of_fp32_groups[held.param_group_index]
            there, here = held.hp_fragment_address, held.lp_fragment_address
            return Piece(flat, there.start, here.start, here.numel)
        group, at, padded = self.zero.grad_position[self.zero.get_param_id(p)]
        first = self.weights.get_local_rank() * padded
        length = min(padded, shape_of(p).numel() - first)
        return Piece(self.zero.fp32_partitioned_groups_flat[group], at, first, length) if length > 0 else None

    def _flats(self) -> Iterator[Tensor]:
        yield from (
            self.zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.zero.single_partition_of_fp32_groups
        )

    def _spread(self) -> None:
        """The float32 weights into the model's."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero.empty_partition_cache()
        for i in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(i)
        if kept := self.zero.persistent_parameters:
            kept[0].all_gather(kept)


def gathered(p: nn.Parameter, **named: Any) -> AbstractContextManager[Any]:
    """The whole parameter is there, in every stage. modifier_rank: whose change counts."""
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(p, **named)
    return context


def assembled(whole: Tensor, held: Tensor | None, first: int, weights: DeviceMesh) -> Tensor:
    """Fills `whole`, zeros, on every rank: with `held`, what this one has, from element `first` on, and with
    what the others have. All but one add zero to each element.
    """
    if held is not None:
        whole.view(-1)[first : first + held.numel()] = held
    dist.all_reduce(whole, group=weights.get_group())
    return whole


def shared(whole: Tensor, weights: DeviceMesh) -> DTensor:
    """This rank's rows of what all of `weights`, one axis, have, in memory of their own."""
    rows = distribute_tensor(whole, weights, [Shard(0)], src_data_rank=None).to_local().clone()
    return DTensor.from_local(
        rows, weights, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def shape_of(p: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, of which ZeRO 3 may have left nothing in place."""
    shape: torch.Size = getattr(p, "ds_shape", p.shape)
    return shape


def blank_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of a parameter of two elements before its first step: zeros, of its shape or of none."""
    twin, p = copy.copy(optimizer), nn.Parameter(torch.zeros(2))
    p.grad = torch.zeros(2)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**optimizer.param_groups[0], "params": [p]}]
    twin.step()
    return {key: torch.zeros_like(torch.as_tensor(value)) for key, value in twin.state[p].items()}
