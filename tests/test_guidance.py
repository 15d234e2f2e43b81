"""Guidance of weight w: its formula, the pictures of diffusers' pipelines at it, and the modes that draw with it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl.testing import flagsaver
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, SanaPipeline, StableDiffusion3Pipeline
from oracle import error
from PIL import Image

from solrl_jax import config, guidance, lora, main, plan, rollout, sharding, structs, train
from solrl_jax.config import Config, ConfigError, Evaluate, Stage
from solrl_jax.models import flux, sana, sd35
from solrl_jax.plan import jaxpr, shapes
from solrl_jax.report import run as runs
from solrl_jax.run import assemble, evaluate, model_card, pictures
from solrl_jax.run.encode import Conditioner
from tests import nano, nano_sana, nano_sd35, toy_world
from tests.tiers import long, slow
from tests.toy_world import metrics_of

pytestmark = pytest.mark.usefixtures("compiled")

PROMPTS = nano.PROMPTS[:3]
STEPS = 6


# --- the formula ----------------------------------------------------------------------------------------------------


def linear(kind="cfg") -> structs.Model:
    """v = 2 x + text + sigma, of latents [B, 1, 1, 3]; toy_world's otherwise."""

    def velocity(variables, x, sigma, cond):
        return 2 * x + (cond["text"] + sigma[:, None])[:, None, None]

    return toy_world.TOY._replace(velocity=velocity, guidance=kind, noise=lambda key: jax.random.normal(key, (1, 1, 3)))


def given(seed: int):
    rng = np.random.default_rng(seed)
    x, sigma = rng.normal(size=(4, 1, 1, 3)), np.array([0.9, 0.5, 0.3, 0.1])
    rows = ({"text": rng.normal(size=(n, 3))} for n in (4, 1))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, sigma, *rows))


@pytest.mark.parametrize("w", [1.5, 4.5])
def test_it_leads_from_the_negative_to_the_prompt(w):
    """2 x + sigma + n + w (c - n), for each row its own c and one n; and with both swapped, c + w (n - c)."""
    model, (x, sigma, cond, negative) = linear(), given(0)
    rows = guidance.conditioned(model, cond, negative, w)
    assert rows["text"].shape == (8, 3)
    found = guidance.velocity(model, w)({}, x, sigma, rows)
    c, n = cond["text"][:, None, None], negative["text"][:, None, None]
    same = 2 * x + sigma[:, None, None, None]
    np.testing.assert_allclose(found, same + n + w * (c - n), rtol=1e-5)
    swapped = {"text": jnp.concatenate([rows["text"][4:], rows["text"][:4]])}
    np.testing.assert_allclose(guidance.velocity(model, w)({}, x, sigma, swapped), same + c + w * (n - c), rtol=1e-5)
    assert np.abs(found - (same + c)).max() > 0.1


@pytest.mark.parametrize("kind", ["cfg", "embedded", "none"])
def test_a_weight_of_1_is_the_program_without_guidance(kind):
    """The same operations, although a negative conditioning is there."""
    model, (_, _, cond, negative) = linear(kind), given(1)
    assert guidance.velocity(model, 1.0) is model.velocity
    assert guidance.conditioned(model, cond, negative, 1.0) is cond and not guidance.doubles(model, 1.0)
    keys = jax.random.split(jax.random.key(0), (4, 2))
    stage = Stage(3, "euler")

    def plain(cond, keys):  # what `rollout.velocity_of` was before there was guidance
        twice = jax.tree.map(lambda c: jnp.repeat(c, 2, axis=0), model.prepare({}, cond))

        def velocity(x, sigma):
            return model.velocity({}, x, sigma, twice)

        return rollout.trajectory(velocity, rollout.Seeds(keys, keys), model=model, stage=stage)[0]

    def ours(cond, keys):
        return rollout.integrate({}, cond, keys, model=model, stage=stage, negative=negative)

    assert str(jax.make_jaxpr(ours)(cond, keys)) == str(jax.make_jaxpr(plain)(cond, keys))


def test_embedded_is_a_leaf_and_no_second_row():
    model, (_, _, cond, negative) = linear("embedded"), given(2)
    rows = guidance.conditioned(model, cond, negative, 3.5)
    assert rows["text"] is cond["text"] and rows["guidance"].tolist() == [3.5] * 4
    assert guidance.velocity(model, 3.5) is model.velocity and not guidance.doubles(model, 3.5)
    with pytest.raises(ConfigError, match=r"^guidance 3.5: this toy takes no guidance"):
        guidance.conditioned(linear("none"), cond, negative, 3.5)


# --- diffusers' pipelines -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("guided")


@functools.cache
def built(root, name):
    """(module, model config, weights, diffusers' pipeline) of nano weights, random ones."""
    if name == "flux":
        module, kind, cfg = flux, FluxPipeline, nano.build(root / name).model
    else:
        module, kind, of = {
            "sd35": (sd35, StableDiffusion3Pipeline, nano_sd35),
            "sana": (sana, SanaPipeline, nano_sana),
        }[name]
        changes = nano_sd35.MEDIUM if name == "sd35" else {}
        (root / name).mkdir()
        cfg = of.model(of.write(root / name / "pipeline", **changes))
    pipe = kind.from_pretrained(cfg.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return module, cfg, module.load(cfg), pipe


def drawn(root, name, w, *, negative="", **changes):
    """(our latents of PROMPTS [3, h, w, c], the noise in torch's order, the negative conditioning)."""
    module, cfg, (base, _, encoders), _ = built(root, name)
    model, mesh = module.make(dataclasses.replace(cfg, **changes)), sharding.make_mesh(1)
    text = Conditioner(model, encoders, mesh, group=len(PROMPTS), stay=True, negative=negative)
    cond, away = text(PROMPTS), text.negative()
    keys = jax.random.split(jax.random.key(3), (len(PROMPTS), 1))
    stage = Stage(STEPS, "euler", chunk=len(PROMPTS), guidance=w)
    with jax.set_mesh(mesh):
        draw = jax.jit(functools.partial(rollout.sample, model=model, stage=stage))
        x0 = draw({"params": base}, cond, keys, negative=away if guidance.doubles(model, w) else None)
    noise = torch.tensor(np.asarray(rollout.noises(model, keys[:, 0]))).permute(0, 3, 1, 2)
    return x0[:, 0], noise, jax.device_get(away)


@pytest.mark.long
@pytest.mark.parametrize("name", ["flux", "sana"])
def test_frozen_weights_over_two_devices(root, name):
    """The negative row is whole on both; each has its own prompts."""
    module, cfg, (base, _, encoders), _ = built(root, name)
    model, found = module.make(dataclasses.replace(cfg, guidance="cfg")), []
    keys = jax.random.split(jax.random.key(3), (4, 2))
    for devices in (1, 2):
        mesh = sharding.make_mesh(devices, devices)
        text = Conditioner(model, encoders, mesh, group=4, stay=True, negative="")
        variables = {"params": sharding.place(base, mesh)}
        given = text(nano.PROMPTS[:4]), sharding.split(keys, mesh)
        draw = functools.partial(rollout.sample, model=model, stage=Stage(2, "euler", chunk=2, guidance=4.0))
        with jax.set_mesh(mesh):
            found.append(jax.device_get(jax.jit(draw)(variables, *given, negative=text.negative())))
    np.testing.assert_allclose(*found, atol=1e-4 * np.abs(found[0]).max())


def flux_latents(pipe, noise, **how):
    packed = FluxPipeline._pack_latents(noise, 3, 4, 8, 8)
    how |= {"height": 16, "width": 16, "num_inference_steps": STEPS, "max_sequence_length": 8}
    found = pipe(PROMPTS, latents=packed, output_type="latent", **how).images
    return FluxPipeline._unpack_latents(found, 16, 16, 2).permute(0, 2, 3, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_flux_as_diffusers(root):
    """Embedded, at the pipeline's default and at 1; and by a negative prompt, its true_cfg_scale."""
    pipe, model = built(root, "flux")[3], flux.make(built(root, "flux")[1])
    assert (model.guidance, model.guided) == ("embedded", 3.5)
    found = {}
    for w in (1.0, 3.5):
        found[w], noise, _ = drawn(root, "flux", w)
        assert error(found[w], flux_latents(pipe, noise, guidance_scale=w)) < 1e-4
    assert np.abs(found[3.5] - found[1.0]).max() > 1e-2
    for negative in ("", "a large pink square"):
        x0, noise, _ = drawn(root, "flux", 4.0, negative=negative, guidance="cfg")
        public = flux_latents(pipe, noise, guidance_scale=1.0, true_cfg_scale=4.0, negative_prompt=[negative] * 3)
        assert error(x0, public) < 1e-4
        assert np.abs(x0 - found[1.0]).max() > 1e-2


def test_flux_embedded_at_1_is_what_it_was(root):
    """A leaf of ones, to the bit; 3.5 is another velocity."""
    module, cfg, (base, _, _), _ = built(root, "flux")
    model = module.make(cfg)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    cond = {"text": jax.random.normal(jax.random.key(1), (2, 8, 16)), "pooled": jnp.ones((2, 16))}
    sigma, run = jnp.array([0.9, 0.2]), jax.jit(model.velocity)
    plain = run({"params": base}, x, sigma, cond)
    ones, more = (run({"params": base}, x, sigma, {**cond, "guidance": jnp.full(2, w)}) for w in (1.0, 3.5))
    np.testing.assert_array_equal(ones, plain)
    assert np.abs(more - plain).max() > 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_sd35_as_diffusers(root):
    """At the pipeline's default, at the card's and at 1; the negative is the empty prompt by both CLIPs and T5."""
    module, cfg, _, pipe = built(root, "sd35")
    assert (module.make(cfg).guidance, module.make(cfg).guided) == ("cfg", 4.5)
    how = {"max_sequence_length": nano_sd35.TOKENS}
    with torch.no_grad():
        _, states, _, pooled = pipe.encode_prompt(PROMPTS[0], None, None, **how)
    how |= {"height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "latent"}
    for w, negative in ((1.0, ""), (4.5, ""), (7.0, ""), (7.0, "a large pink square")):
        x0, noise, away = drawn(root, "sd35", w, negative=negative)
        if negative == "":
            assert error(away["text"], states) < 1e-5 and error(away["pooled"], pooled) < 1e-5
        more = {"negative_prompt": [negative] * 3} if negative else {}
        public = pipe(PROMPTS, latents=noise, guidance_scale=w, **more, **how).images.permute(0, 2, 3, 1)
        assert error(x0, public) < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_sana_as_diffusers(root):
    """At the pipeline's default and at 1; the negative is the empty prompt without instruction, one token."""
    module, cfg, _, pipe = built(root, "sana")
    assert (module.make(cfg).guidance, module.make(cfg).guided) == ("cfg", 4.5)
    how = {"complex_human_instruction": None, "max_sequence_length": nano_sana.TOKENS}
    with torch.no_grad():
        _, _, states, mask = pipe.encode_prompt(PROMPTS[0], **how)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    how |= {"height": 32, "width": 32, "use_resolution_binning": False, "output_type": "latent"}
    how |= {"sigmas": np.linspace(1, 0, STEPS + 1)[:-1].tolist(), "num_inference_steps": STEPS}
    for w in (1.0, 4.5):
        x0, noise, away = drawn(root, "sana", w)
        assert away["length"].tolist() == mask.sum(-1).tolist() == [1]
        assert error(away["text"], states) < 1e-5
        public = pipe(PROMPTS, latents=noise, guidance_scale=w, **how).images.permute(0, 2, 3, 1)
        assert error(x0, public) < 1e-4


@pytest.mark.parametrize(("embeds", "kind"), [(False, "none"), (True, "embedded")])
def test_a_flux_without_the_input_takes_none(tmp_path, embeds, kind):
    cfg = nano.build(tmp_path)
    file = tmp_path / "pipeline/transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_embeds": embeds}))
    model = flux.make(cfg.model)
    assert (model.guidance, model.guided) == (kind, 3.5 if embeds else 1.0)
    assert flux.make(dataclasses.replace(cfg.model, guidance="cfg"))[-3:] == ("cfg", 1.0, False)


# --- a run's evaluation, and --mode=eval ----------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """toy_world's, which is guided; its own weight is 3."""
    monkeypatch.setattr(toy_world, "TOY", toy_world.TOY._replace(guidance="cfg", guided=3.0))
    return toy_world.world(monkeypatch, tmp_path)


@pytest.mark.slow
def test_a_run_evaluates_with_it_and_trains_without(toy, tmp_path, monkeypatch):
    titles, write = [], pictures.write_grid
    monkeypatch.setattr(pictures, "write_grid", lambda *given: titles.append([*given[2]]) or write(*given))
    found, said = {}, "evaluations are at guidance {}, also the base's; its own is 3: --mode=eval shows it there too"
    for w in (1.0, 2.5):
        cfg = config.override(toy, iterations=1, **{"evaluate.guidance": w})
        train.train(cfg, tmp_path / f"w{w}", devices=1)
        found[w] = metrics_of(tmp_path / f"w{w}")
        assert said.format(f"{w:g}") in json.loads((tmp_path / f"w{w}/starts.json").read_text())[0]["notes"]
    assert titles == [["base"], ["base", "iteration 1"], ["base w=2.5"], ["base w=2.5", "iteration 1 w=2.5"]]
    assert guidance.evaluated(toy) == 1
    for number, line in found[2.5].items():
        for name, value in line.items():
            assert (value == found[1.0][number][name]) != name.startswith("eval_"), name
    base, last = (pictures.load(tmp_path / "w2.5/grids" / f"{name}.npz") for name in ("base", "last"))
    assert base.how == last.how and " w=2.5, of " in base.how
    plain = pictures.load(tmp_path / "w1.0/grids/base.npz").how
    assert plain.startswith(f"{dataclasses.replace(toy.evaluate, every=0)!r}, of ")
    card, page = ((tmp_path / "w2.5" / name).read_text() for name in ("model_card.md", "report.html"))
    assert "| pictures in its evaluations | guidance 2.5 |" in card and "512 px, guidance 1.0" in card
    assert "before training w=2.5" in page and "iteration 1 w=2.5" in page and "are at guidance 2.5" in page
    assert "w=" not in (tmp_path / "w1.0/report.html").read_text().split("</style>")[1].split("<script")[0]
    assert runs.read(tmp_path / "w2.5", "a").guidance == 2.5 and runs.read(tmp_path / "w1.0", "a").guidance == 1


@pytest.mark.slow
def test_pictures_are_those_of_the_formula_on_any_number_of_devices(toy):
    """Of a policy, with the toy's velocity written out."""
    cfg, w = config.override(toy, **{"evaluate.guidance": 2.5}), 2.5
    found = []
    for devices in (1, 2):
        parts = assemble.assemble(cfg, devices)
        with jax.set_mesh(parts.mesh):
            adapter = assemble.fresh(parts).lora
            found.append(evaluate.pictures(parts, adapter, ["prompt 1", "prompt 4"], score=parts.judged))
    np.testing.assert_array_equal(found[0].images, found[1].images)
    table, kernel = parts.text.params["embed"], np.asarray(parts.frozen.base["to_q"]["kernel"])
    rows = [np.asarray(table)[toy_world.tokenize([text]) % 8].mean(1) for text in ("prompt 4", "")]
    text = rows[1] + w * (rows[0] - rows[1])
    key = evaluate.evaluation_keys(cfg.seed, 0, 4)[3]  # the second picture of the second prompt
    x, sigmas = np.asarray(rollout.noises(parts.model, key[None])).reshape(1, -1), np.linspace(1, 0, 4)
    table = rollout.sampler.table(sigmas, "dpm2")
    before = x * 0
    for i, sigma in enumerate(sigmas[:-1]):
        now = x - sigma * (x @ kernel + 0.1 * text)
        x = table.x[i] * x + table.x0[i, 0] * now + table.x0[i, 1] * before
        before = now
    expect = 255 / (1 + np.exp(-x.reshape(4, 4)))
    assert np.abs(found[0].images[1, 1, ..., 0] - expect).max() <= 0.51


@pytest.mark.slow
def test_the_table_shows_the_base_at_its_own_weight(toy, tmp_path, capsys):
    """Beside a policy; in halved chunks, which changes no picture."""
    run = tmp_path / "run"
    train.train(config.override(toy, iterations=2), run, devices=1)
    tables, place = {}, run / "checkpoints" / "2"
    for w, at in ((0.0, place), (3.0, place), (1.5, place), (3.0, None)):
        capsys.readouterr()
        cfg = config.override(toy, **{"evaluate.guidance": w})
        evaluate.run_eval(cfg, tmp_path / "eval", place=at, lora_file=None, devices=1)
        tables[w, at] = [line for line in capsys.readouterr().out.splitlines()[:-1] if line]
    with flagsaver.flagsaver():  # by the run's own config
        assert main.main(main.parse(["x", "--devices=1", "--mode=eval", f"--run_dir={run}", "--guidance=3"])) == 0
    assert [line for line in capsys.readouterr().out.splitlines()[:-1] if line] == tables[3.0, place]
    heads = [" ".join(table[0].split()) for table in tables.values()]
    assert heads == [
        "reward base policy base w=3",
        "reward base w=3 policy w=3",
        "reward base w=1.5 policy w=1.5 base w=3",
        "reward base w=3",
    ]
    plain, own, _, alone = (np.array([line.split()[1:] for line in table[1:]], float) for table in tables.values())
    assert all(len(line) == len(table[0]) for table in tables.values() for line in table)
    np.testing.assert_array_equal(plain[:, 2], own[:, 0])
    np.testing.assert_array_equal(alone[:, 0], own[:, 0])
    assert not np.array_equal(plain[:, 0], own[:, 0])
    assert Image.open(tmp_path / "eval" / "eval.png").width > 0


@pytest.mark.parametrize(
    ("chunk", "images", "half"), [(24, 1, 12), (24, 24, 12), (4, 2, 2), (3, 3, 1), (2, 6, 1), (1, 1, 1)]
)
def test_a_chunk_of_half_the_size(chunk, images, half):
    cfg = Config(evaluate=Evaluate(chunk=chunk, images=images))
    parts = assemble.Parts(cfg, *[None] * 9)._replace(model=linear()._replace(guided=4.0))
    how = evaluate.at_own(parts).cfg.evaluate
    assert (how.chunk, how.guidance) == (half, 4.0)
    guided = dataclasses.replace(cfg, evaluate=dataclasses.replace(cfg.evaluate, guidance=2.0))
    same = parts._replace(model=parts.model._replace(guidance="embedded")), parts._replace(cfg=guided)
    assert all(evaluate.at_own(each).cfg.evaluate.chunk == chunk for each in same)  # no more rows than before


@pytest.mark.slow
def test_a_plan_counts_both_rows(tmp_path):
    """Forward passes of classifier-free guidance twice, and memory for them; an embedded weight costs nothing."""
    cfg = config.override(nano.build(tmp_path), **{"evaluate.steps": 4, "evaluate.prompts": 8})
    found = {}
    for kind, w in (("auto", 1.0), ("auto", 3.5), ("cfg", 3.5)):
        one = config.override(cfg, **{"model.guidance": kind, "evaluate.guidance": w})
        sizes = shapes.read(one, 1)
        found[kind, w] = plan.use_of("evaluate", one, sizes, 1, plan.CARDS["H100 80GB"])
    x, sigma = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 8, 4), (1,)))
    policy = jax.eval_shape(
        functools.partial(lora.policy, cfg=cfg.lora), sizes.frozen.base, shapes.blank(cfg, sizes).ema
    )
    one = jaxpr.trace(sizes.model.velocity, policy, x, sigma, shapes.batch(sizes.prompts.cond, 1))
    plain = found["auto", 1.0]
    assert found["auto", 3.5].flops == plain.flops
    assert found["cfg", 3.5].flops.total() - plain.flops.total() == 8 * 4 * jaxpr.flops(one).total()
    assert found["cfg", 3.5].activations > plain.activations


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(root, tmp_path, monkeypatch, capsys):
    """command(name, *words) -> (exit code, output, error) on the nano pipeline `name`."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        build = {"flux": nano.build, "sana": nano_sana.build, "sd35": nano_sd35.build}[name]
        (root / f"{name}-run").mkdir(exist_ok=True)
        made = build(root / f"{name}-run", evaluate=Evaluate(prompts=4, steps=2, grid=2, chunk=4, solver="euler"))
        monkeypatch.setattr(config, "load", lambda spec, overrides: config.override(made, **overrides))
        capsys.readouterr()  # what building said
        with flagsaver.flagsaver():
            code = main.main(main.parse(["x", "--config=nano", "--devices=1", *words]))
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("name", [slow("flux"), long("sana"), long("sd35")])
def test_pictures_of_the_command(command, name, tmp_path):
    """1 is the default, to the bit; more draws other pictures, and so does another negative prompt."""
    words = {"none": [], "one": ["--guidance=1"], "more": ["--guidance=4"]}
    words |= {"same": ["--config.evaluate.guidance=4"]}
    if name != "flux":
        words |= {"empty": ["--guidance=4", "--negative="], "negative": ["--guidance=4", "--negative=a red circle"]}
    found = {}
    for title, more in words.items():
        how = "--mode=sample", "--prompt=a small blue square", f"--run_dir={tmp_path / title}"
        code, _, err = command(name, *how, *more)
        assert code == 0, err
        found[title] = (tmp_path / title / "samples" / "0000_0.png").read_bytes()
    assert found["none"] == found["one"] != found["more"] == found["same"]
    if name != "flux":
        assert found["empty"] == found["more"] != found["negative"]
    code, out, err = command(name, "--mode=eval", "--guidance=4", f"--run_dir={tmp_path / 'e'}")
    assert code == 0 and " ".join(out.splitlines()[0].split()) == "reward base w=4", err


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("flux", ["--mode=sample", "--guidance=0.5"], "--guidance=0.5: give 1 (none) or a finite number above it"),
        ("flux", ["--mode=sample", "--guidance=0"], "--guidance=0: give 1 (none) or a finite number above it"),
        ("flux", ["--mode=eval", "--guidance=nan"], "--guidance=nan: give 1 (none)"),
        ("flux", ["--mode=eval", "--guidance=inf"], "--guidance=inf: give 1 (none)"),
        ("flux", ["--config.evaluate.guidance=0.9"], "evaluate.guidance=0.9: 1 (none) or a finite number above it, or"),
        ("flux", ["--config.evaluate.guidance=nan"], "evaluate.guidance=nan: 1 (none) or a finite"),
        ("flux", ["--config.evaluate.guidance=-inf"], "evaluate.guidance=-inf: 1 (none) or a finite"),
        ("flux", ["--config.regenerate.guidance=-2"], "guidance=-2.0: 1 (none) or a finite number above it"),
        ("flux", ["--config.explore.guidance=2"], "explore.guidance=2 with regenerate.guidance=1: this flux takes"),
        ("sana", ["--config.learn.guidance=2"], "learn.guidance=2 with regenerate.guidance=1: no policy draws so"),
        (
            "sd35",
            ["--mode=plan", "--config.learn.guidance=2"],
            "learn.guidance=2 with regenerate.guidance=1: no policy",
        ),
        ("flux", ["--guidance=2"], "--guidance is for --mode=sample and --mode=eval; the evaluation of a run takes"),
        ("flux", ["--mode=plan", "--negative=blurred"], "--negative is for --mode=sample and --mode=eval"),
        ("flux", ["--mode=eval", "--guidance=2", "--config.evaluate.guidance=3"], "are both given: give one of them"),
        (
            "flux",
            ["--mode=sample", "--prompt=x", "--guidance=2", "--negative=blurred"],
            "--negative='blurred': guidance of this flux is a number that the network takes, without a negative prompt",
        ),
        (
            "flux",
            ["--mode=sample", "--prompt=x", "--negative=blurred", "--config.model.guidance=cfg"],
            "--negative='blurred' has no effect at guidance 1: give --guidance above 1, such as",
        ),
        (
            "sana",
            ["--mode=eval", "--negative=blurred"],
            "--negative='blurred' has no effect at guidance 1: give --guidance above 1, such as 4.5",
        ),
    ],
)
def test_what_is_refused(command, monkeypatch, name, words, message):
    """In one line, before weights are read; nothing is written."""
    monkeypatch.setattr(assemble, "open_weights", None)
    code, _, err = command(name, *words)
    assert code == 2 and err.startswith("error: ") and message in err and len(err.splitlines()) == 1, err


def test_a_negative_text_that_is_cut_is_told(toy, capsys, monkeypatch, tmp_path):
    """By the text encoder's name; one that fits is not."""
    monkeypatch.setattr(evaluate, "pictures", lambda *given, **how: evaluate.Pictures(np.zeros((1, 1, 2, 2, 3)), {}))
    monkeypatch.setattr(evaluate, "_save", lambda *given: None)
    for negative, said in (("blurred", False), ("blurred " * 60, True)):
        cfg = config.override(toy, **{"evaluate.guidance": 2.0})
        how = {"place": None, "lora_file": None, "devices": 1, "negative": negative}
        evaluate.run_sample(cfg, tmp_path, prompts=["x"], **how)
        assert ("--negative is longer than" in capsys.readouterr().out) == said


@pytest.mark.parametrize("mode", ["train", "eval", "sample", "doctor"])
def test_a_model_that_takes_none_refuses(command, monkeypatch, mode):
    monkeypatch.setattr(assemble, "open_weights", None)
    monkeypatch.setattr(flux.FluxConfig, "read", functools.partial(read_without, flux.FluxConfig.read))
    more = "--config.evaluate.guidance=2", "--config.model.text_tokens=7"  # a model that no other test makes
    code, out, err = command("flux", f"--mode={mode}", *more, *(["--prompt=x"] if mode == "sample" else []))
    said = out if mode == "doctor" else err
    assert code == (1 if mode == "doctor" else 2)
    assert "evaluate.guidance=2: this flux takes no guidance (it has no input for it, as FLUX.1-schnell)" in said


def read_without(read, folder):
    """A config without the input for guidance."""
    return dataclasses.replace(read(folder), guidance_embeds=False)


def test_the_model_card_of_an_unguided_run_is_as_it_was():
    facts = model_card.facts(Config(), 1, 1, ("to_q",))
    assert not any("evaluations" in name for name in facts)
    guided = config.override(Config(), **{"evaluate.guidance": 4.5})
    assert model_card.facts(guided, 1, 1, ("to_q",)).items() - facts.items() == {
        ("pictures in its evaluations", "guidance 4.5")
    }
