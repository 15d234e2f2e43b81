"""The decoders at their true width, compiled for an H100 without one: what up-sampling and norms become."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from solrl_jax import weights
from solrl_jax.models import dcae, public, vae
from tests import card

pytestmark = pytest.mark.usefixtures("optimised")

B, SIDE = 8, 64  # as many pictures of 512 px as are decoded at a time
WIDTHS = (128, 256, 512, 512)


def compiled(module, *shape: int):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    spec = jax.eval_shape(lambda x: module.init(jax.random.key(0), x)["params"], x)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), spec)
    return card.compiled(lambda p, x: module.apply({"params": p}, x), params, x, on=card.mesh())


@pytest.fixture(scope="module")
def flux():
    """FLUX's decoder."""
    cfg = vae.VaeConfig(
        block_out_channels=WIDTHS, layers_per_block=2, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    return compiled(vae.Decoder(cfg), B, SIDE, SIDE, 16)


def kernels(program) -> list[tuple[str, str, str, str]]:
    """(result, opcode, operands' types, the rest) of all instructions outside of fusions that write something."""
    entry = program.as_text().partition("\nENTRY")[2]
    lines = re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)$", entry, re.M)
    types = {name: kind for name, kind, *_ in lines}
    views = ("parameter", "constant", "get-tuple-element", "bitcast", "tuple")
    return [
        (kind, op, " ".join(types.get(x, "") for x in re.findall(r"%([\w.\-]+)", given)), rest)
        for _, kind, op, given, rest in lines
        if op not in views
    ]


def dims(kind: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, x.split(","))) for x in re.findall(r"\w+\[([\d,]+)\]", kind)]


def convolutions(program) -> list[tuple[tuple[int, ...], tuple[int, ...], str]]:
    """(result's shape, kernel's shape [out, height, width, in], the layer's path) of every convolution."""
    found = [
        (dims(kind)[0], dims(given)[1], rest) for kind, _, given, rest in kernels(program) if "__cudnn$conv" in rest
    ]
    return [(result, kernel, re.search(r'op_name="([^"]*)"', rest)[1]) for result, kernel, rest in found]


def flops(result: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    return 2 * math.prod(result) * math.prod(kernel[1:])


@pytest.mark.slow
def test_up_sampling(flux):
    """No convolution on an up-sampled picture: 2x2 on the small one, 16/36 of the FLOPs and the border's."""
    found = convolutions(flux)
    up = [(result, kernel) for result, kernel, path in found if "upsamplers" in path]
    assert up == [
        ((B, 65, 65, 2048), (2048, 2, 2, 512)),
        ((B, 129, 129, 2048), (2048, 2, 2, 512)),
        ((B, 257, 257, 1024), (1024, 2, 2, 256)),
    ]
    before = sum(2 * B * (2 * (r[1] - 1)) ** 2 * 9 * k[-1] * k[0] // 4 for r, k in up)
    assert sum(flops(*each) for each in up) / before == pytest.approx(16 / 36, rel=0.02)
    # 3x3 ones, by side: two of the middle's and of each level's resnets, conv_in and conv_out.
    sides = [result[1] for result, kernel, _ in found if kernel[1] == 3]
    assert {side: sides.count(side) for side in sides} == {64: 11, 128: 6, 256: 6, 512: 7}
    total = sum(flops(*each[:2]) for each in found)
    assert (total / B, before / total) == (pytest.approx(2.090e12, rel=1e-3), pytest.approx(0.334, rel=0.01))


@pytest.mark.slow
def test_the_pixel_shuffle_is_one_elementwise_kernel(flux):
    """It reads what the convolution wrote and writes the picture: no transposing kernel, no copy, no picture of
    repeated pixels. The bias is in the convolution's epilogue."""
    made = [
        (op, dims(kind)[0], dims(given)[0], rest) for kind, op, given, rest in kernels(flux) if "upsamplers" in rest
    ]
    big = [(op, shape, given, rest) for op, shape, given, rest in made if math.prod(shape) > B * SIDE**2 * 512]
    assert [(op, shape) for op, shape, *_ in big] == [
        *((op, shape) for side, c in ((64, 512), (128, 512), (256, 256)) for op, shape in (
            ("custom-call", (B, side + 1, side + 1, 4 * c)), ("fusion", (B, 2 * side, 2 * side, c))))
    ]  # fmt: skip
    assert all("__cudnn$convBiasActivationForward" in rest for *_, rest in big[::2])
    assert all(
        "kind=kLoop" in rest and given == conv
        for (_, _, given, rest), (_, conv, *_) in zip(big[1::2], big[::2], strict=True)
    )
    assert flux.memory_analysis().temp_size_in_bytes < 2.9e9  # 2.78 GB, as in two steps


def test_one_pass_for_the_norms(flux):
    """Each of the 30 GroupNorms' sums come from one kernel, two results; no activation is in memory in f32."""
    sums = [shapes for kind, *_ in kernels(flux) if kind.startswith("(f32") and len(shapes := dims(kind)) == 2]
    rows = [first for first, second in sums if first == second and len(first) == 3]
    assert len(rows) == 30 and {shape[1] for shape in rows} == {64, 128, 256, 512}
    wide = [
        kind for kind, *_ in kernels(flux) if "f32[8,64,64,512]" in kind or re.search(r"f32\[8,\d+,\d+,\d{3},", kind)
    ]
    f32 = [
        math.prod(shape) for kind, *_ in kernels(flux) for shape in dims(" ".join(re.findall(r"f32\[[\d,]+\]", kind)))
    ]
    assert not wide and max(f32) == B * SIDE**4  # the attention's scores


def test_up_sampling_of_dcae():
    """The shortcut is added in the kernel of the pixel shuffle."""
    program = compiled(dcae.Upsample(256, jnp.bfloat16), 2, 256, 256, 512)
    big = [(op, dims(kind)[0]) for kind, op, *_ in kernels(program) if math.prod(dims(kind)[0]) > 2 * 256**2 * 512]
    assert big == [("custom-call", (2, 257, 257, 1024)), ("fusion", (2, 512, 512, 256))]


@pytest.mark.slow
def test_dcae_at_1024_pixels():
    """The whole of it: five up-samplings, none on a picture of repeated pixels."""
    cfg = weights.from_config(dcae.DcaeConfig, "memory", public.SANA_VAE)
    found = convolutions(compiled(dcae.Decoder(cfg), 2, 32, 32, 32))
    up = [(result[1], kernel) for result, kernel, _ in found if kernel[1] == 2]
    widths = (128, 256, 512, 512, 1024, 1024)
    wanted = [(32 * 2**i + 1, (4 * widths[4 - i], 2, 2, widths[5 - i])) for i in range(5)]
    assert sorted(up) == wanted
