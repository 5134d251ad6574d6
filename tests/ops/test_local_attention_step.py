import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.testing import assert_close

from spade_ext.ops import local_attention, local_attention_step, local_attention_step_ref

from .checks import TOLERANCES, check_against_reference, check_opcheck, check_same_bits, relative_errors
from .sample_inputs import constant, local_attention_step_sample, local_attention_step_samples, padding, randn

SAMPLES = local_attention_step_samples()
BY_NAME = {sample.name: sample for sample in SAMPLES}
STEP = torch.ops.spade_ext.local_attention_step.default
ALL_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def and_caches(step):
    """A step that writes copies of the caches and returns them too."""

    def call(q, k, v, bias, k_cache, v_cache, position, **options):
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        return step(q, k, v, bias, k_cache, v_cache, position, **options), k_cache, v_cache

    return call


def sequence(B=3, L=40, H=4, Hkv=2, D=8, Dv=6, size=7):
    """q, k, v and bias of `local_attention` with the window (size - 1, 0)."""
    return constant(B, L, H, D), constant(B, L, Hkv, D), constant(B, L, Hkv, Dv), constant(H, size)


def empty_cache(t, size):
    """Of keys or values (B, L, Hkv, D): NaN."""
    return torch.full((t.size(0), size, *t.shape[2:]), torch.nan, dtype=t.dtype)


def prefilled_cache(t, counts, size):
    """After counts (B,) tokens, the last ones of each row, by the rule of the docstring."""
    slot = torch.arange(size)
    last = counts[:, None] - 1
    token = last - (last - slot) % size
    column = token + t.size(1) - counts[:, None]
    cache = t[torch.arange(t.size(0))[:, None], column.clamp(min=0)]
    return cache.masked_fill((token < 0)[..., None, None], torch.nan)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_matches_reference(sample, dtype):
    check_against_reference(and_caches(local_attention_step), and_caches(local_attention_step_ref), sample, dtype)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    position=st.lists(st.integers(-5, 400), max_size=3),
    size=st.integers(1, 150),
    Hkv=st.integers(1, 3),
    group=st.integers(0, 5),
    D=st.integers(1, 140),
    Dv=st.integers(0, 140),
    with_bias=st.booleans(),
    dtype=st.sampled_from(ALL_DTYPES),
)
def test_matches_reference_on_random_shapes(position, size, Hkv, group, D, dtype, **options):
    sample = local_attention_step_sample("", position, size, Hkv * group, D, Hkv=Hkv, **options)
    check_against_reference(and_caches(local_attention_step), and_caches(local_attention_step_ref), sample, dtype)


@pytest.mark.parametrize("size", [1, 7, 40, 70])
def test_steps_are_the_sequence(size):
    q, k, v, bias = sequence(size=size)
    expected = local_attention(q, k, v, bias, window=(size - 1, 0))
    caches = empty_cache(k, size), empty_cache(v, size)
    for t in range(q.size(1)):
        out = local_attention_step(q[:, t], k[:, t], v[:, t], bias, *caches, torch.full((3,), t))
        assert_close(out, expected[:, t], **TOLERANCES[torch.float64])


def test_rows_that_begin_later_are_left_padded():
    size, begin = 7, torch.tensor([0, 3, 25])
    q, k, v, bias = sequence(size=size)
    mask = padding(*((b, 40) for b in begin), length=40)
    expected = local_attention(q, k, v, bias, window=(size - 1, 0), attention_mask=mask)
    caches = empty_cache(k, size), empty_cache(v, size)
    for t in range(40):
        out = local_attention_step(q[:, t], k[:, t], v[:, t], bias, *caches, t - begin)
        assert_close(out[t >= begin], expected[t >= begin, t], **TOLERANCES[torch.float64])
        assert (out[t < begin] == 0).all()


@pytest.mark.parametrize("prompt", [1, 5, 7, 20])
@pytest.mark.parametrize("begin", [[0, 0, 0], [0, 3, 19]], ids=str)
def test_steps_continue_a_prompt(prompt, begin):
    size, begin = 7, torch.tensor(begin).clamp(max=prompt)
    q, k, v, bias = sequence(size=size)
    mask = padding(*((b, 40) for b in begin), length=40)
    expected = local_attention(q, k, v, bias, window=(size - 1, 0), attention_mask=mask)
    caches = [prefilled_cache(t[:, :prompt], prompt - begin, size) for t in (k, v)]
    for t in range(prompt, 40):
        out = local_attention_step(q[:, t], k[:, t], v[:, t], bias, *caches, t - begin)
        assert_close(out, expected[:, t], **TOLERANCES[torch.float64])


@pytest.mark.parametrize("L", [7, 20, 21])
def test_ring_after_a_prompt_is_its_last_keys_rolled(L):
    k = constant(2, L, 2, 4)
    assert torch.equal(k[:, -7:].roll(L % 7, dims=1), prefilled_cache(k, torch.full((2,), L), 7))


def test_beams_are_reordered_by_rows():
    beams = torch.tensor([6, 6, 3, 0, 4, 4, 2])
    q, k, v, bias, *caches, position = BY_NAME["rows_begin_apart"].args
    caches = [cache.clone() for cache in caches]
    chosen = [t.index_select(0, beams) for t in (q, k, v, *caches, position)]
    expected = local_attention_step(q, k, v, bias, *caches, position).index_select(0, beams)
    assert torch.equal(local_attention_step(*chosen[:3], bias, *chosen[3:]), expected)
    assert torch.equal(chosen[3], caches[0].index_select(0, beams))


def test_chunks_are_a_ring_that_starts_again():
    q, k, v, _ = sequence()
    bias = constant(4, 13)
    expected = local_attention(q, k, v, bias, chunk_size=7, causal=True)
    caches = empty_cache(k, 7), empty_cache(v, 7)
    for t in range(40):
        out = local_attention_step(q[:, t], k[:, t], v[:, t], bias[:, :7], *caches, torch.full((3,), t % 7))
        assert_close(out, expected[:, t], **TOLERANCES[torch.float64])


def test_slots_of_other_tokens_stay():
    q, k, v, bias, k_cache, v_cache, _ = (t.clone() for t in local_attention_step_sample("", [0, 0]).args)
    before = k_cache.clone(), v_cache.clone()
    local_attention_step(q, k, v, bias, k_cache, v_cache, torch.tensor([8, -1]))
    for cache, old, new in zip((k_cache, v_cache), before, (k, v), strict=True):
        old[0, 3] = new[0]
        assert torch.equal(cache, old)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(sample):
    check_opcheck(STEP, sample.args, sample.kwargs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps_are_compiled_once(backend):
    """Two layers; the position is a tensor."""

    def two_layers(q, k, v, bias, position, *caches):
        q = local_attention_step(q, k, v, bias, *caches[:2], position)
        return local_attention_step(q + 1, k, v, bias, *caches[2:], position)

    torch._dynamo.reset()
    counters.clear()
    q, k, v, bias = sequence(Dv=8)
    compiled = torch.compile(two_layers, fullgraph=True, backend=backend)
    caches, expected_caches = ([empty_cache(k, 7) for _ in range(4)] for _ in range(2))
    for t in range(20):
        arguments = (q[:, t], k[:, t], v[:, t], bias, t - torch.arange(3))
        assert_close(compiled(*arguments, *caches), two_layers(*arguments, *expected_caches))
    for cache, expected in zip(caches, expected_caches, strict=True):
        assert_close(cache, expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["rows_begin_apart", "wide", "grouped"])
def test_same_bits_for_any_number_of_threads(name, dtype, set_threads):
    check_same_bits(and_caches(local_attention_step), BY_NAME[name].to(dtype), set_threads)


@pytest.mark.parametrize("size", [1, 16, 128, 1000])
def test_float32_precision(size):
    sample = local_attention_step_sample("", [2000, size // 2], size, H=4, Hkv=2, D=64)
    errors = relative_errors(and_caches(local_attention_step), and_caches(local_attention_step), sample, torch.float32)
    assert max(errors) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["wide", "grouped", "one_key_head"])
def test_half_types_are_float32_rounded_once(name, dtype):
    sample = BY_NAME[name].to(dtype)
    actual = and_caches(local_attention_step)(*sample.args)
    expected = and_caches(local_attention_step)(*sample.to(torch.float32).args)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e.to(dtype))


def test_step_raises_the_versions_of_the_caches():
    *arguments, k_cache, v_cache, position = BY_NAME["scale"].args
    versions = k_cache._version, v_cache._version
    local_attention_step(*arguments, k_cache, v_cache, position)
    assert (k_cache._version, v_cache._version) == (versions[0] + 1, versions[1] + 1)


@pytest.mark.parametrize(("index", "name"), list(enumerate(("q", "k", "v", "bias", "k_cache", "v_cache"))))
def test_refuses_gradients(index, name):
    arguments = [t.clone() for t in BY_NAME["scale"].args]
    arguments[index].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"^local_attention_step: {name} requires a gradient, expected none:"):
        local_attention_step(*arguments)
    with torch.no_grad():
        assert not local_attention_step(*arguments).requires_grad


def test_autocast_steps_in_its_type():
    q, k, v, bias, k_cache, v_cache, position = BY_NAME["scale"].to(torch.float32).args
    caches = [k_cache.bfloat16(), v_cache.bfloat16()]
    expected_caches = [cache.clone() for cache in caches]
    expected = local_attention_step(*(t.bfloat16() for t in (q, k, v, bias)), *expected_caches, position)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(local_attention_step(q, k, v, bias, *caches, position), expected)
        with pytest.raises(TypeError, match="^local_attention_step: k_cache is Float, expected BFloat16, the dtype of"):
            local_attention_step(q, k, v, bias, k_cache, v_cache, position)
    assert torch.equal(caches[0], expected_caches[0])


def test_inference_mode():
    *arguments, k_cache, v_cache, position = BY_NAME["scale"].args
    expected = local_attention_step(*arguments, k_cache.clone(), v_cache.clone(), position)
    with torch.inference_mode():
        for caches in ((k_cache.clone(), v_cache.clone()), (k_cache, v_cache)):
            assert torch.equal(local_attention_step(*arguments, *caches, position), expected)


def test_caches_that_overlap_are_refused():
    *arguments, k_cache, _, position = BY_NAME["scale"].args
    with pytest.raises(ValueError, match="^local_attention_step: k_cache and v_cache share memory, expected separate"):
        local_attention_step(*arguments, k_cache, k_cache, position)
    with pytest.raises(ValueError, match=r"^local_attention_step: k_cache has strides \[0, .*expected no two elements"):
        local_attention_step(*arguments, k_cache[:1].expand(2, 5, 2, 4), k_cache, position)


def arguments(**changes):
    values = {"q": randn(2, 4, 3), "k": randn(2, 2, 3), "v": randn(2, 2, 5), "bias": randn(4, 6)}
    values |= {"k_cache": randn(2, 6, 2, 3), "v_cache": randn(2, 6, 2, 5), "position": torch.tensor([0, 9])}
    return {k: v.detach() for k, v in (values | changes).items()}


ERRORS = [
    (ValueError, {"q": randn(2, 1, 4, 3)}, r"q has shape \[2, 1, 4, 3\], expected \(B, H, D\)"),
    (ValueError, {"k": randn(2, 3)}, r"k has shape \[2, 3\], expected \(B, Hkv, D\)"),
    (ValueError, {"v": randn(2, 5)}, r"v has shape \[2, 5\], expected \(B, Hkv, Dv\)"),
    (ValueError, {"k": randn(1, 2, 3)}, r"k has shape \[1, 2, 3\], expected 2 in dimension 0 of \(B, Hkv, D\)"),
    (ValueError, {"k": randn(2, 2, 4)}, r"k has shape \[2, 2, 4\], expected 3 in dimension 2 of \(B, Hkv, D\)"),
    (ValueError, {"v": randn(2, 1, 5)}, r"v has shape \[2, 1, 5\], expected 2 in dimension 1 of \(B, Hkv, Dv\)"),
    (ValueError, {"q": randn(2, 3, 3)}, r"k has 2 heads, expected a divisor of the 3 heads of q"),
    (ValueError, {"k_cache": randn(2, 2, 3)}, r"k_cache has shape \[2, 2, 3\], expected \(B, left \+ 1, Hkv, D\)"),
    (ValueError, {"v_cache": randn(2, 2, 5)}, r"v_cache has shape \[2, 2, 5\], expected \(B, left \+ 1, Hkv, Dv\)"),
    (ValueError, {"k_cache": randn(2, 0, 2, 3)}, r"k_cache has shape \[2, 0, 2, 3\], expected at least 1 in dimension"),
    (ValueError, {"k_cache": randn(1, 6, 2, 3)}, r"k_cache has shape .*, expected 2 in dimension 0 of"),
    (ValueError, {"k_cache": randn(2, 6, 4, 3)}, r"k_cache has shape .*, expected 2 in dimension 2 of"),
    (ValueError, {"k_cache": randn(2, 6, 2, 4)}, r"k_cache has shape .*, expected 3 in dimension 3 of"),
    (ValueError, {"v_cache": randn(2, 5, 2, 5)}, r"v_cache has shape .*, expected 6 in dimension 1 of"),
    (ValueError, {"v_cache": randn(2, 6, 2, 3)}, r"v_cache has shape .*, expected 5 in dimension 3 of"),
    (ValueError, {"bias": randn(6)}, r"bias has shape \[6\], expected \(H, left \+ 1\)"),
    (ValueError, {"bias": randn(2, 6)}, r"bias has shape \[2, 6\], expected 4 in dimension 0 of \(H, left \+ 1\)"),
    (ValueError, {"bias": randn(4, 7)}, r"bias has shape \[4, 7\], expected 6 in dimension 1 of \(H, left \+ 1\)"),
    (ValueError, {"position": torch.tensor(3)}, r"position has shape \[\], expected \(B,\)"),
    (ValueError, {"position": torch.ones(3).long()}, r"position has shape \[3\], expected 2 in dimension 0 of \(B,\)"),
    (TypeError, {"position": torch.ones(2).int()}, r"position is Int, expected int64"),
    (TypeError, {"q": torch.ones(2, 4, 3).long()}, r"q is Long, expected float64, float32, float16 or bfloat16"),
    (TypeError, {"k": randn(2, 2, 3).float()}, r"k is Float, expected Double, the dtype of q"),
    (TypeError, {"v_cache": randn(2, 6, 2, 5).half()}, r"v_cache is Half, expected Double, the dtype of q"),
    (TypeError, {"bias": randn(4, 6).float()}, r"bias is Float, expected Double, the dtype of q"),
    (
        ValueError,
        {"q": randn(2, 4, 0), "k": randn(2, 2, 0), "k_cache": randn(2, 6, 2, 0)},
        r"scale is None with q of shape \[2, 4, 0\], expected a number where D is 0",
    ),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("error", "change", "message"), ERRORS)
def test_errors(error, change, message, device):
    values = {name: t.to(device) for name, t in arguments(**change).items()}
    with pytest.raises(error, match=f"^local_attention_step: {message}"):
        local_attention_step(**values)


@pytest.mark.parametrize("name", ["k", "v", "bias", "k_cache", "v_cache", "position"])
def test_another_device_is_refused(name):
    message = f"^local_attention_step: {name} is on meta, expected cpu, the device of q"
    with pytest.raises(ValueError, match=message):
        local_attention_step(**arguments() | {name: arguments()[name].to("meta")})
