"""`block_attention` under `torch.compile`: one graph, the same numbers, and no compilation per plan."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import random_plan, tensors, uniform, window_plan

from dit_accel.kernels import Precision, Remainder, block_attention
from dit_accel.kernels.custom_op import enter
from dit_accel.kernels.spec import AttentionCall
from dit_accel.plan import Blocking


@pytest.fixture(autouse=True)
def _forget_compilations():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A compiler that only counts."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def around(q, k, v, plan, **options):
    return block_attention(2 * q, k, v, plan, backend="torch", **options) + 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remainder": Remainder("diagonal", "grouped", 2), "scale": 0.3},
        {"remainder": Remainder(about="query")},
        {"precision": Precision("int8"), "kv_len": torch.tensor([50, 70])},
    ],
    ids=["plain", "remainder", "about", "int8"],
)
def test_it_is_one_graph_with_the_same_result(options):
    q, k, v = (x.float() for x in tensors(batch=2, queries=70))
    plan = random_plan(*uniform(70, 16))
    compiled = torch.compile(around, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, plan, **options), around(q, k, v, plan, **options))


def test_windows_and_the_log_sum_exp_pass_through():
    q, k, v = (x.float() for x in tensors(queries=70))
    plan, _ = window_plan(*uniform(70, 16), 9)

    def both(q, k, v):
        return block_attention(q, k, v, plan, return_lse=True, backend="torch")

    got = torch.compile(both, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(got, both(q, k, v))


def test_counts_lists_and_lengths_do_not_compile_again():
    counter = Counter()
    compiled = torch.compile(around, backend=counter, fullgraph=True)
    for seed, (tokens, share) in enumerate([(70, 0.3), (90, 0.7), (110, 0.2), (61, 0.9), (200, 0.5)]):
        q, k, v = (x.float() for x in tensors(queries=tokens, seed=seed))
        plan = random_plan(*uniform(tokens, 16), share=share, seed=seed)
        torch.testing.assert_close(compiled(q, k, v, plan), around(q, k, v, plan))
    # The second shape makes the first graph dynamic; nothing after it compiles.
    assert counter.graphs <= 2


@pytest.mark.parametrize("transposed", [False, True])
def test_the_fake_promises_what_the_operator_gives(transposed):
    q, k, v = (x.float() for x in tensors(queries=40))
    if transposed:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    blocks = Blocking.from_lengths([16, 3, 16, 5])
    plan = random_plan(blocks, blocks)
    operator = torch.ops.dit_accel.block_attention
    captured = []

    def record(*arguments):
        captured.append(arguments)
        return operator(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.dit_accel, "block_attention", record)
        enter(q, k, v, AttentionCall(plan, 0.25), "torch")
    torch.library.opcheck(operator, captured[0], test_utils=("test_schema", "test_faketensor"))
