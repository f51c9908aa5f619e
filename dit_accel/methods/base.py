"""What a method is: decisions about order, selection and remainder, with validated parameters."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from dit_accel.errors import PlanError
from dit_accel.kernels import block_attention
from dit_accel.kernels.spec import Precision, Remainder
from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder
from dit_accel.plan import BlockPlan
from dit_accel.remainders.partial import PartialAttention
from dit_accel.shard import HeadShard
from dit_accel.state import CallContext

Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
BlockSize = Annotated[int, Field(ge=1, le=1024)]
Size = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
FROM_LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
SizeTriple = Annotated[tuple[Size, Size, Size], FROM_LIST]
CountTriple = Annotated[tuple[Count, Count, Count], FROM_LIST]


class Method(BaseModel):
    """Base class of every method: a frozen record of parameters that makes plans and holds no state.

    A subclass sets `name`, documents its parameters as pydantic fields, and implements `select`. It contains no
    kernel and no model code. What it must remember between calls lives in `call.memory` or `call.shared`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, serialize_by_alias=True)

    name: ClassVar[str]
    source: ClassVar[str]
    """Where the method comes from: arXiv id or "this project"."""
    is_static: ClassVar[bool] = False
    """True when order and plan depend on the layout alone: they are then made once and shared by layers and steps."""

    @property
    def has_static_order(self) -> bool:
        """Whether `order` depends on the layout alone and is the same for all heads. Default: as `is_static`.

        Such an order can be hoisted: tokens are put into it once per forward pass, and not in every layer.
        """
        return self.is_static

    @property
    def orders_each_head(self) -> bool:
        """Whether heads may stand in orders of their own: no block of one is a block of another then. Default False."""
        return False

    @property
    def cycle(self) -> int:
        """Steps after which its costs repeat: an order that some steps share, all keys at one of them. Default 1."""
        return 1

    @property
    def keeps_padding_last(self) -> bool:
        """Whether video tokens that are padding stand last in its order too, where kernels and scores look for them.

        Default: yes with the raster, no with an order of its own. A call whose padding reaches into the video
        (`TokenLayout.pads_video`) runs dense where they do not.
        """
        return type(self).order is Method.order

    def check_model(self, heads: int) -> None:
        """Refuse a model before it runs: parameters per head, files that are not there. Default: any will do.

        Args:
            heads: attention heads of a layer, or how many representatives stand for them.

        Raises:
            ConfigError: a parameter is for another model.
        """

    def of_heads(self, shard: HeadShard) -> Self:
        """The method for some heads of a model: parameters that stand head by head are cut. Default: itself.

        Raises:
            ConfigError: what is for all heads cannot be cut.
        """
        return self

    @property
    def decides_for_branches(self) -> bool:
        """Whether the first guidance branch of a step chooses the blocks for all. Default False.

        `order` must then give all branches of a step the same order, which it keeps in `call.branches`.
        """
        return False

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Choose how tokens stand. q, k, v `[B, H, N, D]` in raster order. Default None: raster."""
        return None

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Choose the key blocks of each query block. q, k `[B, H, N, D]` stand in the order chosen by `order`.

        The few methods whose choice depends on the values find them, in the same order, in `call.values`.
        """

    @property
    def holds_plans(self) -> bool:
        """Whether the method says itself how long a plan that depends on q and k lasts, see `held_plan`.

        Default False: the schedule does.
        """
        return False

    def held_plan(self, call: CallContext) -> BlockPlan | None:
        """The plan, for all heads, that what the method keeps in `call.memory` goes with, and no other.

        It runs whatever plans other layers, guidance branches or steps have. Default None: there is none.
        """
        return None

    @property
    def remainder(self) -> Remainder | None:
        """What becomes of blocks that were not selected. Default None: they are dropped."""
        return None

    @property
    def precision(self) -> Precision | None:
        """The arithmetic of the exact part. Default None: that of the inputs."""
        return None

    @property
    def needs_all_queries(self) -> str | None:
        """Why the output of a query depends on other queries than itself; None: it does not.

        Where it does not, processes that hold all keys can share the queries (ring attention).
        """
        remainder, precision = self.remainder, self.precision
        if not self.is_static:
            return "it chooses key blocks by what all queries hold"
        if self.completes:
            return "it computes more than its blocks, with all queries"
        if remainder is not None and (remainder.about == "query" or remainder.first_order == "mixed"):
            return "its remainder is computed once for all queries of a block"
        if precision is not None and (precision.qk != "input" or precision.skip is not None):
            return "its arithmetic depends on all queries of a block"
        return None

    @property
    def completes(self) -> bool:
        """Whether `complete` has something to do after the kernel. Default False."""
        return False

    def complete(self, part: PartialAttention) -> Tensor:
        """What a method does after the kernel, for what is no softmax of selected blocks and their remainder.

        Args:
            part: output and log-sum-exp of the plan, and what they were made from.

        Returns:
            The output `[B, H, N, D]`, in the chosen order. Default: that of the plan.
        """
        return part.out

    def extra_density(self, layout: TokenLayout) -> float:
        """Token pairs that `complete` computes per pair of the sequence, on average over many steps. Default 0.0.

        Args:
            layout: token geometry.
        """
        return 0.0

    def logit_scale(self, head_dim: int, layout: TokenLayout) -> float | None:
        """Factor on the logits where the caller names none. Default None: 1 / sqrt(head_dim)."""
        return None

    def compute(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        call: CallContext,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Attention as this method decides it, after order and selection.

        Args:
            q, k, v: `[B, H, N, D]` in the chosen order.
            plan: the selected blocks.
            call: layer, step, memory, and the layout, whose padding gets no weight.
            scale: factor on the logits. Default: `logit_scale`.
            backend: see `block_attention`.

        Returns:
            `[B, H, N, D]`, in the chosen order.
        """
        scale = self.logit_scale(q.shape[-1], call.layout) if scale is None else scale
        kv_len = call.layout.valid_lengths(q.device)
        options: dict[str, Any] = {"scale": scale, "kv_len": kv_len, "backend": backend}
        options |= {"remainder": self.remainder, "precision": self.precision}
        if not self.completes:
            return block_attention(q, k, v, plan, **options)
        out, lse = block_attention(q, k, v, plan, return_lse=True, **options)
        return self.complete(PartialAttention(out, lse, q, k, v, plan, call, scale))

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Names of the parameters, as users write them, with their defaults."""
        return {info.alias or name: info.default for name, info in cls.model_fields.items()}

    @property
    def requested_density(self) -> float | None:
        """The density the user asked for, for the report; None where the method's rule decides."""
        return getattr(self, "density", None)

    @property
    def keeps_shares(self) -> bool:
        """Whether every head keeps the share `density` of its blocks, in which no other head has a say.

        Such a method has a parameter `densities` too, one for every head. Default False.
        """
        return False

    def plan(
        self, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor | None = None, call: CallContext | None = None
    ) -> tuple[TokenOrder | None, BlockPlan]:
        """Order and plan for bare tensors q, k, v `[B, H, N, D]`, without a pipeline.

        Args:
            layout: token geometry; `layout.tokens` must equal N.
            q, k: queries and keys in raster order.
            v: values, for the few methods whose choice depends on them. Default: `k`.
            call: layer, step and memory. Default: layer 0, step 0, empty memory.

        Returns:
            The order (None: raster) and the plan, whose blocks are blocks of the ordered sequence.

        Raises:
            PlanError: padding reaches into the video, and the order does not keep it last.
        """
        if layout.pads_video and not self.keeps_padding_last:
            raise PlanError(
                f"TokenLayout.valid: expected at least {layout.video_slice().stop}, since method {self.name!r} moves "
                f"video tokens and padding must stand last, got {layout.valid}; use an order that leaves them in place"
            )
        call = CallContext(layout) if call is None else call
        v = k if v is None else v
        order = self.order(q, k, v, call)
        if order is not None:
            q, k, v = order.apply(q, k, v)
        call.values = v
        return order, self.select(q, k, call)
