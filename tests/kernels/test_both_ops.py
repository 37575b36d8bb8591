"""What holds for the patch embedding and the stem alike: what is not a number, order of sums, PyTorch's compiler."""

from __future__ import annotations

import pytest
import torch

from ecgscale_kernels import LeadDraw, forced, lead_masked_conv_stem, lead_masked_patch_embed

pytest.importorskip("triton")

# The interpreter computes with NumPy, which warns of NaN.
may_warn = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=[lead_masked_patch_embed, lead_masked_conv_stem], ids=["patch", "stem"])
def op(request):
    return request.param


@pytest.fixture
def arguments_of(op, patch_arguments, stem_arguments):
    def make(batch=3, **fields):
        if op is lead_masked_patch_embed:
            fields = {"options": ("bias", "lead")} | fields
            return patch_arguments(batch, 4, 60, 7, 9, kept="all", **fields)
        return stem_arguments(batch, 4, 60, kept="all", draw=False, **fields)

    return make


def same_bits(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# --- what is not a number ---


@may_warn
@pytest.mark.parametrize("no_number", [float("nan"), float("inf"), -float("inf")])
def test_a_gain_that_is_no_number_spoils_its_row_and_no_other(op, arguments_of, kernels, no_number) -> None:
    arguments = arguments_of()
    with torch.no_grad():
        expected_BND = op(**arguments)
        arguments["gain_BL"][1, 2] = no_number
        result_BND = op(**arguments)
    assert not result_BND[1].isfinite().any()
    assert torch.equal(result_BND[::2], expected_BND[::2])


@may_warn
def test_samples_of_a_masked_lead_do_not_matter(op, arguments_of, run, kernels) -> None:
    arguments = arguments_of(signal=torch.float32)
    masked_BL = torch.zeros_like(arguments["gain_BL"], dtype=torch.bool)
    masked_BL[0, 1] = masked_BL[1] = True
    arguments["gain_BL"][masked_BL] = 0
    expected = run(op, arguments, kernels)
    assert all(found.isfinite().all() for found in expected.values())
    same_bits(run(op, with_no_numbers(arguments, masked_BL), kernels), expected)


@may_warn
def test_samples_and_gain_of_a_lead_that_is_drawn_to_be_masked_do_not_matter(op, arguments_of, run, kernels) -> None:
    arguments = arguments_of(signal=torch.float32)
    row_B = torch.arange(3, device=arguments["gain_BL"].device)
    arguments["lead_draw"] = LeadDraw(2, 4, 0.5, row_B, row_B)
    masked_BL = ~arguments["lead_draw"].keep_BL(4)
    assert masked_BL.any()
    expected = run(op, arguments, kernels)
    spoiled = with_no_numbers(arguments, masked_BL)
    spoiled["gain_BL"] = arguments["gain_BL"].masked_fill(masked_BL, float("nan"))
    same_bits(run(op, spoiled, kernels), expected)


def with_no_numbers(arguments, masked_BL):
    """NaN and infinity by turns as samples, NaN as offset."""
    signal_BLT = arguments["signal_BLT"]
    turn_T = torch.where(torch.arange(signal_BLT.shape[2], device=signal_BLT.device) % 2 == 0, torch.nan, torch.inf)
    spoiled_BLT = torch.where(masked_BL[..., None], turn_T, signal_BLT.detach())
    return arguments | {
        "signal_BLT": spoiled_BLT.requires_grad_(signal_BLT.requires_grad),
        "offset_BL": arguments["offset_BL"].masked_fill(masked_BL, torch.nan),
    }


@may_warn
def test_samples_that_reach_no_token_do_not_matter(op, arguments_of, run, kernels) -> None:
    """Behind the last patch; behind the last pair of samples, since the stem's norm sees all the others."""
    arguments = arguments_of(signal=torch.float32)
    if op is lead_masked_conv_stem:
        arguments["signal_BLT"] = arguments["signal_BLT"][..., :59]
    expected = run(op, arguments, kernels)
    with torch.no_grad():
        arguments["signal_BLT"][..., 56 if op is lead_masked_patch_embed else 58 :] = float("nan")
    same_bits(run(op, arguments, kernels), expected)


def test_equal_samples_have_a_norm(stem_arguments, hold_against_float64, run) -> None:
    """Whatever they are, the norm gives its bias, as if the leads were masked."""
    arguments = stem_arguments(2, 3, 53, kept="all", draw=False)
    constant = arguments | {"signal_BLT": arguments["signal_BLT"][..., :1].expand(-1, -1, 53).contiguous()}
    hold_against_float64(lead_masked_conv_stem, constant)
    masked = arguments | {"gain_BL": torch.zeros_like(arguments["gain_BL"])}
    same_bits(run(lead_masked_conv_stem, constant, "triton"), run(lead_masked_conv_stem, masked, "triton"))


# --- order of sums ---


def test_a_gradient_in_shares_is_right_and_the_same_in_every_run(op, arguments_of, hold_against_float64, run, device):
    """More rows than shares, in numbers that do not divide."""
    arguments = arguments_of(batch=7 if device.type == "cpu" else 307)
    hold_against_float64(op, arguments)
    same_bits(run(op, arguments, "triton"), run(op, arguments, "triton"))


# --- PyTorch's compiler ---


def test_the_compiler_keeps_the_ops(op, arguments_of, run, kernels) -> None:
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    arguments = arguments_of() | {"lead_draw": some_draw(arguments_of())}
    compiled = torch.compile(op, fullgraph=True, backend=backend, dynamic=False)
    found, expected = (run(one, arguments, kernels) for one in (compiled, op))
    assert any("ecgscale" in target for target in seen) == (kernels == "triton")
    if kernels == "triton":
        same_bits(found, expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


def some_draw(arguments) -> LeadDraw:
    row_B = torch.arange(len(arguments["gain_BL"]), device=arguments["gain_BL"].device)
    return LeadDraw(2**63 + 5, 4, 0.5, row_B % 2, row_B)


OPS = ["patch_embed", "patch_embed_weight_grad", "patch_embed_signal_grad", "conv_stem", "conv_stem_grad"]


@pytest.mark.parametrize("name", OPS)
def test_ops_say_what_they_do(recorded_calls, name) -> None:
    """Schema, derivative and fake version agree with what an op does."""
    assert recorded_calls.keys() == set(OPS)
    torch.library.opcheck(getattr(torch.ops.ecgscale, name).default, recorded_calls[name])


def detached(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(detached, value))
    return value.detach() if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module")
def recorded_calls(run, patch_arguments, stem_arguments):
    """The arguments of one call of each op."""
    calls = {}

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "ecgscale":
                calls[func._schema.name.split("::")[1]] = detached(args) if "grad" in func._schema.name else args
            return func(*args, **(kwargs or {}))

    with forced("triton"), Recorder():
        run(lead_masked_patch_embed, patch_arguments(2, 3, 37, 7, 5, signal=torch.float32), "triton")
        run(lead_masked_conv_stem, stem_arguments(2, 3, 37), "triton")
    return calls
