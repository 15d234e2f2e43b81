"""The emoji world: captions and scenes, splits, layouts, drawing, its judge, and what its assets may be."""

import hashlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import pretraining
from experiments.emoji import accuracy, build, check, judge, pretrain, world
from experiments.emoji.world import Scene, Thing, Word
from experiments.pretraining import Fit, Folders
from experiments.tiny.check import draw_samples
from solrl_jax.config import ConfigError, Stage
from solrl_jax.models import flux
from solrl_jax.rewards import clipscore, ocr, own
from solrl_jax.run import data

TOLD = {
    "a fox": Scene((Thing("fox"),)),
    "a fox left of a cup": Scene((Thing("fox"), Thing("cup")), "left of"),
    "an apple above a drum on a blue background": Scene((Thing("apple"), Thing("drum")), "above", "blue"),
    "two foxes": Scene((Thing("fox", 2),)),
    "three mice on a red background": Scene((Thing("mouse", 3),), None, "red"),
    "a unicorn right of two wine glasses": Scene((Thing("unicorn"), Thing("wine glass", 2)), "right of"),
    "an hourglass, a ufo and a hot dog": Scene((Thing("hourglass"), Thing("ufo"), Thing("hot dog"))),
    "the word OPEN in red": Scene(word=Word("OPEN", "red")),
    "the word STOP in blue on a white background": Scene(background="white", word=Word("STOP", "blue")),
}

HELD = ["ART", "BAG", "BATH", "BOX", "CLUB", "COOK", "DAY", "DRINK"]
# Of the pictures of TOLD: their means, and the pixel at (20, 30).
MEANS = [0.7371, 0.6324, 0.7171, 0.7487, 0.5859, 0.8331, 0.7126, 0.6783, 0.9458]
MIDDLES = [0.656, 0.643, 0.512, 0.790, 0.554, 0.840, 0.640, 0.714, 0.367]


# --- captions and splits --------------------------------------------------------------------------------------------


def test_captions_and_scenes_convert_both_ways():
    for text, scene in TOLD.items():
        assert world.caption(scene) == text and world.parse(text) == scene
    rng = np.random.default_rng(0)
    for split in world.SPLITS:
        for scene in world.sample(rng, 200, split):
            assert world.parse(world.caption(scene)) == scene


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("a cloud of foxes", "no number and object"),
        ("a fox near a cup", "no number and object"),
        ("an fox", "no number and object"),
        ("a fox left of a fox", "its things differ"),
        ("two foxes above two cups", "1 to 3 objects"),
        ("a fox and a cup", "two things have one of the relations"),
        ("a fox on a beige background", "the background is one of white"),
        ("the word open in red", "capitals"),
        ("the word OPEN in mauve", "the ink is one of"),
    ],
)
def test_a_caption_of_another_world_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        world.parse(text)


def test_plurals():
    names = ("fox", "mouse", "sheep", "cherry", "monkey", "tomato", "watch", "snowman", "beer mug")
    told = ["foxes", "mice", "sheep", "cherries", "monkeys", "tomatoes", "watches", "snowmen", "beer mugs"]
    assert [build.plural(name) for name in names] == told


def test_splits_share_no_composition():
    rng = np.random.default_rng(1)
    train, test = (world.sample(rng, 900, split) for split in world.SPLITS)
    seen = {c for scene in train for c in world.compositions(scene)}
    new = [[c for c in world.compositions(scene) if world.held_out(c)] for scene in test]
    assert all(new) and not seen & {c for some in new for c in some}
    unseen = {scene.word.text for scene in test if scene.word}
    assert len(unseen) >= 20 and not unseen & {scene.word.text for scene in train if scene.word}
    assert len({thing.name for scene in train for thing in scene.things}) > 0.98 * len(world.OBJECTS)
    assert {letter for scene in train if scene.word for letter in scene.word.text} == set(build.LETTERS)
    a_b = world.compositions(TOLD["a fox left of a cup"])
    assert a_b == world.compositions(world.parse("a cup above a fox")) == ("cup + fox",)


def test_the_hash_stays_the_same():
    held = [word for word in world.WORDS if world.held_out(f"word {word}")]
    assert held[:8] == HELD


def test_prompt_files(tmp_path):
    """The committed files keep to their splits and name their rewards; fresh ones are the same."""
    world.write_prompts(tmp_path)
    prompts = data.read(world.HERE / "prompts")
    assert (len(prompts.train), len(prompts.test), prompts.repeated) == (1500, 500, 0)
    for split, texts in zip(world.SPLITS, (prompts.train, prompts.test), strict=True):
        name = f"{split}_metadata.jsonl"
        assert (tmp_path / name).read_text() == (world.HERE / "prompts" / name).read_text()
        for text, row in zip(texts, prompts.rows_of(texts), strict=True):
            scene = world.parse(text)
            assert world.split_of(scene) == split
            assert row["rewards"] == ["clipscore", *(["ocr", "ocr_strict"] if scene.word else [world.JUDGE])]
            assert not scene.word or ocr.target(row) == scene.word.text


def test_captions_of_objects(tmp_path):
    """For runs without OCR: fresh files are the committed ones; of the trained captions those of objects, others of
    trained compositions, and such with a composition that is held out."""
    world.write_objects(tmp_path, world.HERE / "prompts")
    names = ("train", "test", "compositional")
    found = {name: (tmp_path / f"{name}.txt").read_text().splitlines() for name in names}
    for name, texts in found.items():
        assert (tmp_path / f"{name}.txt").read_text() == (world.HERE / f"prompts/objects/{name}.txt").read_text()
        scenes = [world.parse(text) for text in texts]
        assert len(set(texts)) == len(texts) == (1267 if name == "train" else 500)
        assert all(scene.word is None for scene in scenes)
        assert {world.split_of(scene) for scene in scenes} == {"test" if name == "compositional" else "train"}
    assert not set(found["train"]) & set(found["test"])


# --- layout and drawing ---------------------------------------------------------------------------------------------


def test_layouts_are_valid():
    scenes = world.sample(np.random.default_rng(2), 400, words=False)
    sprites = world.lay_out(scenes, np.random.default_rng(3))
    for i, scene in enumerate(scenes):
        n = sum(thing.count for thing in scene.things)
        centre, half = sprites.centre[i, :n], sprites.size[i, :n, None] / 2
        assert (sprites.size[i, n:] == 0).all() and not np.ptp(sprites.tint[i])
        assert (2 * half >= world.SIZES[n][0]).all() and (2 * half <= world.SIZES[n][1]).all()
        assert (centre - half).min() >= world.MARGIN - 1e-4
        assert (centre + half).max() <= world.SIDE - world.MARGIN + 1e-4
        for a in range(n):
            for b in range(a):
                gap = np.abs(centre[a] - centre[b]) - half[a] - half[b]
                assert gap.max() >= world.GAP - 1e-4
        if scene.relation:
            first = scene.things[0].count
            y, x = centre[first:].mean(0) - centre[:first].mean(0)
            along = dict(zip(world.RELATIONS, (x, -x, y, -y), strict=True))[scene.relation]
            assert along - min(abs(x), abs(y)) >= world.CLEAR - 1e-4 or abs(x) == abs(y)


def test_words_are_inside_the_picture():
    scenes = [scene for scene in world.sample(np.random.default_rng(4), 400) if scene.word]
    sprites = world.lay_out(scenes, np.random.default_rng(5))
    half = sprites.size[..., None] / 2
    there = sprites.size > 0
    assert there.sum(1).tolist() == [len(scene.word.text) for scene in scenes if scene.word]
    assert sprites.size[there].min() >= 8  # what `resampling` needs
    up, down = (sprites.centre - half)[there], (sprites.centre + half)[there]
    assert up[:, 0].min() >= 0 and down[:, 0].max() <= world.SIDE
    assert sprites.centre[there].min() >= 0 and sprites.centre[there].max() <= world.SIDE


def test_drawing_is_a_function_of_the_seed():
    scenes = list(TOLD.values())
    draw = jax.jit(world.draw)
    one, two = (draw(world.lay_out(scenes, np.random.default_rng(6)), world.templates()) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert one.shape == (9, 64, 64, 3) and one.dtype == np.float32 and one.min() >= 0 and one.max() <= 1
    np.testing.assert_allclose(np.asarray(one).mean((1, 2, 3)), MEANS, atol=2e-4)
    np.testing.assert_allclose(np.asarray(one)[:, 20, 30].mean(-1), MIDDLES, atol=2e-3)


def test_a_flat_template_stays_flat():
    """Resampling weights sum to one inside, whatever the size: no grid."""
    sizes = np.array([11.3, 20.0, 24.7, 36.0], np.float32)
    for size, weights in zip(sizes, jax.jit(world.resampling)(jnp.full(4, 31.4), sizes), strict=True):
        weights = np.asarray(weights)
        inside = np.abs(np.arange(64) + 0.5 - 31.4) < size / 2 - max(1, size / 32) - 1
        np.testing.assert_allclose(weights.sum(1)[inside], 1, atol=1e-5)


# --- the judge ------------------------------------------------------------------------------------------------------

WRONG = {
    "a fox": "a wolf",
    "a fox left of a cup": "a fox right of a cup",
    "an apple above a drum on a blue background": "an apple above a drum on a pink background",
    "two foxes": "three foxes",
    "three mice on a red background": "two mice on a red background",
    "a unicorn right of two wine glasses": "a unicorn above two wine glasses",
    "an hourglass, a ufo and a hot dog": "an hourglass, a robot and a hot dog",
}
FACTS_WRONG = {
    "a fox": ("object 1", "number 1", "nothing else"),
    "a fox left of a cup": ("relation",),
    "an apple above a drum on a blue background": ("background",),
    "two foxes": ("number 1",),
    "three mice on a red background": ("number 1",),
    "a unicorn right of two wine glasses": ("relation",),
    "an hourglass, a ufo and a hot dog": ("object 2", "number 2", "nothing else"),
}


def test_the_judge_knows_right_from_wrong():
    """Each picture by its own caption, by one that is wrong in one part, and an empty picture."""
    scenes = [TOLD[text] for text in WRONG]
    images = np.asarray(jax.jit(world.draw)(world.lay_out(scenes, np.random.default_rng(7)), world.templates()))
    batch = np.concatenate([images, images, np.full((1, 64, 64, 3), 0.5, np.float32)])
    tokens = judge.tokenize([*WRONG, *WRONG.values(), "a fox"])
    found = jax.jit(judge.judge)(batch, tokens, judge.objects())
    assert found.exact.tolist() == [True] * 7 + [False] * 8
    for i, text in enumerate(WRONG):
        wrong = np.asarray(found.stated[7 + i] & ~found.right[7 + i])
        assert tuple(np.array(judge.VERDICTS)[wrong]) == FACTS_WRONG[text], text
    np.testing.assert_allclose(np.asarray(found.share)[[0, 1, 7, 8]], [1, 1, 0, 5 / 6], atol=1e-6)
    np.testing.assert_allclose(found.share[14], 1 / 3, atol=1e-6)  # nothing else is there, and no fox


# Train captions, with places and sizes. Without blur and without a comparison within the caption, 9 of 18 pictures of
# them were refused; with candidates .75 sizes apart, the rings: there was a third one beside the second.
HARD = {
    "a mushroom above a candle on a red background": [(17.6, 35.5, 23.8), (45.0, 36.2, 23.6)],
    "a watch below a microphone on a green background": [(43.8, 29.8, 25.0), (16.4, 28.9, 26.2)],
    "two rings left of a moon on a pink background": [(41.2, 26.6, 18.6), (20.1, 22.2, 19.7), (20.2, 50.8, 19.3)],
    "two ferris wheels on a gray background": [(29.3, 16.4, 24.1), (16.2, 49.3, 26.4)],
    "three snowflakes on a purple background": [(45.2, 47.7, 20.3), (46.4, 12.5, 18.2), (18.2, 18.1, 20.7)],
    "a tent left of a lobster on a red background": [(32.3, 18.9, 23.4), (38.3, 46.6, 25.3)],
}


def test_the_judge_sees_through_blur_noise_and_jpeg():
    """In each view all hard captions are right, and with a wrong number they are wrong."""
    scenes = [world.parse(text) for text in HARD]
    sprites = world.lay_out(scenes, np.random.default_rng(9))
    for i, places in enumerate(HARD.values()):
        sprites.centre[i, : len(places)] = np.array(places)[:, :2]
        sprites.size[i, : len(places)] = np.array(places)[:, 2]
        sprites.ground[i] = world.BACKGROUNDS[str(scenes[i].background)]
    drawn = np.asarray(jax.jit(world.draw)(sprites, world.templates()))
    rng = np.random.default_rng(10)
    views = [accuracy.VIEWS[name] for name in ("as drawn", "JPEG, quality 50", "blur, then noise")]
    wrong = [accuracy.wrong(scene, "number", rng) for scene in scenes]
    tokens = judge.tokenize([world.caption(scene) for scene in [*scenes, *filter(None, wrong)]])
    check = jax.jit(judge.judge)
    for view in views:
        images = view.degrade(drawn, rng)
        found = check(np.concatenate([images, images]), tokens, judge.objects())
        assert found.exact.tolist() == [True] * 6 + [False] * 6
        refused = np.asarray(found.stated & ~found.right)
        assert np.array(judge.VERDICTS)[refused.any(0)].tolist() == ["number 1", "number 2"]


def test_the_better_match_has_the_place():
    """Of candidates closer than .85 sizes (17 px) the better one, farther apart both. What is not there takes none."""
    found = judge.Found(
        there=jnp.ones((2, 3), bool),
        match=jnp.array([[0.9, 0.7, 0.7], [0.8, 0.95, 0.99]]),
        centre=jnp.array([[[20.0, 20], [44, 20], [44, 60]], [[20.0, 38], [44, 34], [44, 60]]]),
        size=jnp.full((2, 3), 20.0),
    )
    there = found.there.at[1, 2].set(False)
    kept = judge._best_in_place(found, there)
    assert kept.tolist() == [[True, False, True], [True, True, False]]


def test_the_judge_is_a_reward():
    reward, params = own.find(world.JUDGE).make(None, "bfloat16")
    assert (
        reward.name == world.JUDGE and reward.host is None and params["cells"].shape == (len(world.OBJECTS), 32, 32, 4)
    )
    _, _, tokens = own.find(world.JUDGE).shapes(None, "bfloat16")
    assert tokens.shape == (1, len(judge.FACTS))
    row = judge.tokenize(["two foxes left of a cup on a blue background"])[0].tolist()
    assert row == [world.OBJECTS.index("fox"), 2, world.OBJECTS.index("cup"), 1, -1, 0, 0, 5]
    with pytest.raises(ValueError, match="scored by the reward ocr"):
        judge.tokenize(["the word OPEN in red"])
    with pytest.raises(ConfigError, match="remove it from reward_paths"):
        judge.make("folder")
    with pytest.raises(ValueError, match="3 images for 2 captions"):
        judge.judge(np.zeros((3, 64, 64, 3), np.float32), judge.tokenize(["a fox", "a cup"]), judge.objects())
    with pytest.raises(ValueError, match="64x64"):
        judge.judge(np.zeros((1, 32, 32, 3), np.float32), judge.tokenize(["a fox"]), judge.objects())


def test_wrong_captions_differ_in_one_part():
    rng = np.random.default_rng(8)
    for scene in world.sample(rng, 200, words=False):
        before = judge.row(scene)
        for part in accuracy.PARTS:
            other = accuracy.wrong(scene, part, rng)
            if other is not None:
                changed = [
                    judge.FACTS[i] for i, (a, b) in enumerate(zip(before, judge.row(other), strict=True)) if a != b
                ]
                kind = {"side": "relation", "likest object": "object"}.get(part, part)
                assert len(changed) == 1 and changed[0].startswith(kind), (scene, other)


# --- assets ---------------------------------------------------------------------------------------------------------


def test_assets_are_small_and_their_sources_named():
    sources = (world.ASSETS / "SOURCES.md").read_text()
    assert len(world.OBJECTS) == len(set(world.OBJECTS)) <= 200
    assert tuple(build.picks().values()) == world.OBJECTS
    for name in ("fluent.png", "noto.png", "letters.png", "names.json"):
        content = (world.ASSETS / name).read_bytes()
        assert len(content) < 2**20 and hashlib.sha256(content).hexdigest() in sources
    for style in world.STYLES:
        cells = world.templates(style)
        assert cells.shape == (len(world.OBJECTS) + 26, 32, 32, 4) and cells.dtype == np.float32
        assert (cells[..., 3].max((1, 2)) > 0.9).all() and (cells[..., :3] <= cells[..., 3:] + 1e-6).all()
    for package in (build.FLUENT, build.NOTO):
        assert package.url in sources and package.sha512 in sources
    says = {"fluent": "Microsoft", "noto": "Apache License", "emoji-datasource": "Cal Henderson", "dejavu": "Bitstream"}
    for name, holder in says.items():
        assert holder in (world.ASSETS / f"LICENSE-{name}").read_text()


def test_names_are_one_or_two_words():
    for entry in json.loads((world.ASSETS / "names.json").read_text())["objects"]:
        assert 1 <= len(entry["name"].split()) <= 2 and entry["plural"] == build.plural(entry["name"])


def test_an_archive_with_another_hash_is_refused(tmp_path):
    (tmp_path / "fluent-emoji-3d-1.1.0.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the pinned"):
        build.archive(build.FLUENT, tmp_path)


def test_the_contact_sheet():
    with Image.open(world.HERE / "results/sheet.png") as sheet:
        assert min(sheet.size) > 500
    assert (world.HERE / "results/sheet.png").stat().st_size < 300_000


# --- training its networks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Configs and tokenizers."""
    folder = tmp_path_factory.mktemp("emoji")
    found = Folders(folder / "pipeline", folder / "clip")
    pretraining.write_folders(*found, pretrain.vocabulary(), pretrain.configs(), pretrain.TOKENS)
    return found


def test_captions_fit_and_words_are_spelled(folders):
    """Every word of the world but the drawn ones is one token; T5 spells these in letters. 24 tokens hold all."""
    tokens = pretrain.tokenizer(folders)(["the word OPEN in red", "the word in red", "the word NEPO in red"])
    lengths = (tokens["t5"] > 0).sum(1)  # its padding is 0
    assert lengths.tolist() == [10, 5, 10]  # with the end, and "▁" before the letters
    spelled = tokens["t5"][:, 3:7]
    assert sorted(spelled[0]) == sorted(spelled[2]) and (spelled[0] != spelled[2]).any()
    scenes = [scene for split in world.SPLITS for scene in world.sample(np.random.default_rng(0), 2000, split)]
    captions = [world.caption(scene) for scene in scenes]
    ids = pretrain.tokenizer(folders)(captions)
    assert (ids["t5"] > 0).sum(1).max() <= 20 and (ids["t5"] != 2).all()  # 2 is unknown
    words = [len(caption.replace(",", " ,").split()) for caption in captions]
    of_things = np.array([scene.word is None for scene in scenes])
    np.testing.assert_array_equal((ids["t5"] > 0).sum(1)[of_things], 1 + np.array(words)[of_things])


def test_the_transformers_sizes(folders):
    """At most 16M parameters; only the width differs."""
    for width, millions in ((384, 15.27), (256, 6.87), (160, 2.74)):
        pretraining.write_json(folders.pipeline / "transformer/config.json", pretrain.configs(width)["transformer"])
        model = flux.make(check.model_config(folders.pipeline))
        count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
        assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_mutations_are_of_the_train_split_and_change_one_fact():
    rng = np.random.default_rng(3)
    for scene in world.sample(rng, 300, "train"):
        other = pretrain.mutated(scene, rng)
        assert other != scene and world.split_of(other) == "train"
        if scene.word:
            assert other.word and (other.word.text == scene.word.text) != (other.word.ink == scene.word.ink)
            assert scene.background is None or scene.background in world.legible(other.word.ink)
        else:
            a, b = (set(world.caption(x).replace(",", "").split()) for x in (scene, other))
            assert len(a - b) <= 4  # a name is of two words at most, with its article and number


def test_a_training_goes_on_to_the_same_weights(tmp_path):
    """Stopped by the time after every stretch of steps, it ends with the bits of one that was not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3)).astype(np.float32)
    pool, params = {"x": x, "y": x @ np.float32([1, -2, 3]), "id": np.arange(64, dtype=np.int32)}, {"w": jnp.zeros(3)}

    def loss(params, batch, key):
        return jnp.mean((batch["x"] @ params["w"] - batch["y"] + 0.1 * jax.random.normal(key)) ** 2)

    how = Fit(steps=250, batch=16, rate=0.3, seed=0, label="toy")
    whole = pretraining.fit(loss, params, pool, how)
    assert np.abs(whole["w"] - np.float32([1, -2, 3])).max() < 0.1
    state = tmp_path / "state" / "toy.msgpack"
    for steps in (100, 200):
        with pytest.raises(pretraining.Stopped, match=f"toy: the time is over after {steps} of 250 steps"):
            pretraining.fit(loss, params, pool, how._replace(state=state, until=0.0))
    with pytest.raises(ValueError, match="of a training with steps=250, and this one has 300: give the same"):
        pretraining.fit(loss, params, pool, how._replace(state=state, steps=300))
    with pytest.raises(ValueError, match="of a training with rows=64, and this one has 32: give the same"):
        pretraining.fit(loss, params, {k: v[:32] for k, v in pool.items()}, how._replace(state=state))
    with pytest.raises(ValueError, match="of a training with digest of rows="):
        pretraining.fit(loss, params, pool | {"id": pool["id"] + 1}, how._replace(state=state))
    parts = pretraining.fit(loss, params, pool, how._replace(state=state))
    np.testing.assert_array_equal(whole["w"], parts["w"])
    assert state.exists()  # until the weights are in a file
    again = pretraining.fit(loss, params, pool, how._replace(state=state))
    np.testing.assert_array_equal(whole["w"], again["w"])


def test_spelled_words_are_no_words_of_the_world():
    """Of random letters, by the same rule of splits: none of a held-out word."""
    rng = np.random.default_rng(0)
    scenes = [pretrain.spelled(rng) for _ in range(200)]
    texts = [scene.word.text for scene in scenes if scene.word]
    assert len(texts) == 200 and len(set(texts)) > 180 and set(map(len, texts)) == {2, 3, 4, 5}
    assert not set(texts) & set(world.WORDS) and {world.split_of(scene) for scene in scenes} == {"train"}


def test_scenes_are_drawn_in_parts(folders, monkeypatch):
    """The same in threads and in processes, in any number; no part has the numbers of another."""
    monkeypatch.setattr(pretrain, "PART", 16)
    with ThreadPoolExecutor(2) as host:
        parts = [part.result() for part in pretrain.begin_pool(host, "flow", 0, 1e-4, folders)]
    assert [len(part["tokens"]["t5"]) for part in parts] == [16, 14]
    again = pretrain.part_of("flow", 0, 1, 14, folders)
    jax.tree.map(np.testing.assert_array_equal, parts[1], again)
    assert not np.array_equal(parts[0]["tokens"]["t5"][:14], again["tokens"]["t5"])
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as host:
        (there,) = pretrain.begin_pool(host, "vae", 0, 1e-4, folders)
        here = pretrain.part_of("vae", 0, 0, 8, folders)
        jax.tree.map(np.testing.assert_array_equal, there.result(), here)
    assert here["sprites"][0].shape[0] == 8


def test_of_a_folder_that_is_not_done_nothing_is_taken(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain.main([f"--out={tmp_path / 'own'}", f"--like={tmp_path / 'other'}", "--width=160"])
    assert "--like: there is no" in capsys.readouterr().err and not (tmp_path / "own").exists()


def test_a_folder_keeps_its_width_and_its_vae(tmp_path):
    """What is taken from the committed folder, and then asked for otherwise."""
    here, own = (Folders(folder / "pipeline", folder / "clip") for folder in (world.HERE, tmp_path))
    pretrain.prepare(own, 160, here)
    for part in ("vae/config.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (own.pipeline / part).read_bytes() == (here.pipeline / part).read_bytes()
    assert own.done["clip"].read_bytes() == here.done["clip"].read_bytes() and not own.done["flow"].exists()
    assert json.loads((own.pipeline / "transformer/config.json").read_text())["num_attention_heads"] == 5
    pretrain.prepare(own, 160, here)
    with pytest.raises(ValueError, match=r"--width=256: .*pipeline was begun with 160: give that, or another --out"):
        pretrain.prepare(own, 256, here)
    own.done["vae"].write_bytes(b"another")
    with pytest.raises(ValueError, match=r"--like: .*safetensors is another one already"):
        pretrain.prepare(own, 160, here)


def test_the_networks_are_small():
    files = [file for part in ("pipeline", "clip") for file in (world.HERE / part).rglob("*") if file.is_file()]
    assert 40e6 < sum(file.stat().st_size for file in files) < 60e6
    weights = 2 * 15.3e6  # bytes in bf16
    transformer = world.HERE / "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert transformer.stat().st_size == pytest.approx(weights, rel=0.01)


@pytest.mark.slow
def test_the_networks_draw_what_they_are_told():
    """The committed base, by the judge: of single objects at least half; their CLIP tells each from the others."""
    scenes = [Scene((Thing(name),)) for name in ("fox", "apple", "key", "drum", "snail", "star", "cactus", "whale")]
    captions = [world.caption(scene) for scene in scenes]
    cfg = check.model_config(world.HERE / "pipeline")
    base, vae_params, text = jax.tree.map(jnp.asarray, flux.load(cfg))
    model = flux.make(cfg)
    tokens = jax.tree.map(jnp.asarray, model.tokenize(captions))
    cond = jax.jit(model.encode)(text, tokens)
    images = np.asarray(draw_samples(cfg, base, vae_params, cond, 1, Stage(steps=10, chunk=1)))[:, 0]
    assert accuracy.judged(images, scenes).exact.sum() >= 4
    reward, params = clipscore.make(str(world.HERE / "clip"))
    one = jax.jit(reward.score)
    scores = np.array([one(params, images, reward.tokenize([caption] * len(images))) for caption in captions])
    assert (scores.argmax(0) == np.arange(len(scenes))).sum() >= 6


@pytest.mark.long
def test_the_networks_are_trained_in_parts(tmp_path, monkeypatch):
    """By the command, a little at a time, with small networks; the folders are those that a run reads."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = pretrain.configs(width=64)
    made["transformer"] |= {"num_single_layers": 1}
    made["clip"] = made["clip"] | {f"{x}_config": made["clip"][f"{x}_config"] | small for x in ("text", "vision")}
    made["clip"]["vision_config"] |= {"patch_size": 32}
    monkeypatch.setattr(pretrain, "VAE", pretrain.VAE | {"block_out_channels": [8, 8, 8]})
    monkeypatch.setattr(pretrain, "configs", lambda width: made | {"vae": pretrain.VAE})
    monkeypatch.setattr(pretrain, "watch", lambda *given: "seen")
    words = [f"--out={tmp_path}", "--scale=1e-4", "--flow_steps=1010000", "--flow_batch=2"]
    assert pretrain.main([*words, "--minutes=0"]) == 75  # between two trainings
    assert len([*tmp_path.rglob("*.safetensors")]) == 1 and not [*tmp_path.rglob("*.msgpack")]
    assert pretrain.main([*words, "--minutes=0"]) == 75  # in one
    stopped = {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert (tmp_path / "state/flow.msgpack").exists() and len(stopped) == 1
    assert pretrain.main(words) == 0
    assert len([*tmp_path.rglob("*.safetensors")]) == 5 and not [*tmp_path.rglob("*.msgpack")]
    reward, params = clipscore.make(str(tmp_path / "clip"))
    score = reward.score(params, jnp.zeros((1, 64, 64, 3)), reward.tokenize(["a fox"]))
    assert np.isfinite(score).all()
    base, vae_params, text = flux.load(check.model_config(tmp_path / "pipeline"))
    assert base and vae_params and text
    other = tmp_path / "other"
    assert (
        pretrain.main([f"--out={other}", f"--like={tmp_path}", "--scale=1e-4", "--flow_steps=20000", "--seed=1"]) == 0
    )
    same = [(folder / "clip/model.safetensors").read_bytes() for folder in (tmp_path, other)]
    assert same[0] == same[1] and len([*other.rglob("*.safetensors")]) == 5
