"""Models by folder or by name: what is asked of the hub, and that every way it fails ends in one line. No network."""

import fnmatch
import json
from types import SimpleNamespace

import huggingface_hub
import jax
import pytest
from huggingface_hub import errors

from solrl_jax import config
from solrl_jax.config import ConfigError
from solrl_jax.models import flux, flux2, public, zimage
from solrl_jax.rewards import clipscore
from solrl_jax.run import assemble
from solrl_jax.weights import WeightsError, hub

NAME = "org/flux"
PAGE = f"https://huggingface.co/{NAME}"
SMALL = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model"]
HEAVY = [f"{part}/diffusion_pytorch_model*.safetensors" for part in ("transformer", "vae")]
HEAVY += ["text_encoder*/model*.safetensors"]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What was asked of snapshot_download, (patterns, local_files_only); `asked.local` and `asked.far` answer it."""

    class Asked(list):
        local: object = errors.LocalEntryNotFoundError("not in the cache")
        far: object = tmp_path / "fetched"

    calls = Asked()

    def download(name, *, allow_patterns, local_files_only=False):
        assert name in (NAME, "org/clip")
        calls.append((allow_patterns, local_files_only))
        answer = calls.local if local_files_only else calls.far
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    hub._fetch.cache_clear()
    yield calls
    hub._fetch.cache_clear()


def test_a_folder_is_taken_as_it_is(asked, tmp_path):
    (tmp_path / "org" / "flux").mkdir(parents=True)
    assert str(hub.pipeline(NAME)) == NAME and hub.model(str(tmp_path)) == tmp_path and not asked


@pytest.mark.parametrize(
    "path", ["nowhere", "/no/where", "./org/flux", "../flux", "a/b/c", "org/", "~/flux", "org/fl ux"]
)
def test_what_is_no_name_is_not_asked_for(asked, path):
    with pytest.raises(
        WeightsError, match=r"is not a directory: give the folder of a model .*--config.model.path=DIR, or"
    ):
        hub.pipeline(path)
    assert not asked


def test_no_model_is_said():
    with pytest.raises(WeightsError, match=r"no model is given: give the folder"):
        hub.pipeline("")


def test_only_what_is_read_is_fetched_and_once(asked, tmp_path):
    assert hub.pipeline(NAME, configs_only=True) == hub.pipeline(NAME, configs_only=True) == tmp_path / "fetched"
    assert asked == [(SMALL, True), (SMALL, False)]
    assert hub.pipeline(NAME) == hub.pipeline(NAME) == tmp_path / "fetched"
    assert asked[2:] == [(SMALL + HEAVY, True), (SMALL + HEAVY, False)]
    assert hub.model("org/clip") == tmp_path / "fetched"
    assert asked[-1] == (["config.json", "*.json", "*.txt", "model*.safetensors"], False)


INDEX = {
    "_class_name": "FluxPipeline",
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
WORDS = ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json")
WORDS = (*WORDS, "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json")
SHARDS = tuple(f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
LARGE = (*(f"transformer/{shard}" for shard in SHARDS), "vae/diffusion_pytorch_model.safetensors")
LARGE = (*LARGE, "text_encoder/model.safetensors", "text_encoder_2/model.fp16.safetensors")


def whole(folder):
    """FLUX.1-dev's files, empty but for what says where others are: the transformer in three shards."""
    hub.write_configs(folder, public.FLUX_DEV)
    for file in (*WORDS, *LARGE):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    map_ = {f"{i}.weight": shard for i, shard in enumerate(SHARDS)}
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": map_}))
    return folder


def test_a_whole_cache_needs_no_network(asked, tmp_path):
    asked.local = whole(tmp_path / "cached")
    assert hub.pipeline(NAME) == hub.pipeline(NAME, configs_only=True) == asked.local
    assert [local for _, local in asked] == [True, True]
    assert hub.read_of(asked.local) == [asked.local / file for file in LARGE]


@pytest.mark.parametrize("gone", [*LARGE, "transformer/diffusion_pytorch_model.safetensors.index.json"])
def test_a_download_that_was_cut_short_goes_on(asked, tmp_path, gone):
    """One weight file lacks: its configs are there, what is large is asked for again."""
    asked.local = whole(tmp_path / "cached")
    (asked.local / gone).unlink()
    assert hub.pipeline(NAME, configs_only=True) == asked.local and len(asked) == 1
    assert hub.pipeline(NAME) == tmp_path / "fetched"
    assert asked[1:] == [(SMALL + HEAVY, True), (SMALL + HEAVY, False)]


@pytest.mark.parametrize("gone", ["model_index.json", *public.FLUX_DEV, *WORDS])
def test_configs_that_lack_are_fetched(asked, tmp_path, gone):
    asked.local = whole(tmp_path / "cached")
    (asked.local / gone).unlink()
    assert hub.pipeline(NAME, configs_only=True) == hub.pipeline(NAME) == tmp_path / "fetched"
    assert [local for _, local in asked] == [True, False] * 2


def test_an_index_of_parts_that_is_cut_is_fetched_again(asked, tmp_path):
    asked.local = whole(tmp_path / "cached")
    (asked.local / "model_index.json").write_text("{")
    assert hub.pipeline(NAME, configs_only=True) == tmp_path / "fetched"


@pytest.mark.parametrize(
    ("files", "enough"),
    [
        (("config.json", "model.safetensors"), True),
        (("config.json", "model-00001-of-00002.safetensors"), False),
        (("config.json",), False),
        (("model.safetensors",), False),
    ],
)
def test_a_reward_of_which_a_part_is_cached(asked, tmp_path, files, enough):
    asked.local = tmp_path / "cached"
    asked.local.mkdir()
    for file in files:
        (asked.local / file).touch()
    assert hub.model("org/clip") == (asked.local if enough else tmp_path / "fetched")


def test_the_real_cache_is_read_without_network(tmp_path, monkeypatch):
    """The hub's own layout of folders, as any version of its client left it; HF_HUB_OFFLINE is set in tests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    root, commit = tmp_path / "models--org--cached", "a" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    hub.write_configs(root / "snapshots" / commit, public.FLUX_DEV)
    (root / "snapshots" / commit / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert flux.make(config.Model(path="org/cached")).name == "flux"
    assert flux.token_shapes(config.Model(path="org/cached"), 3)["t5"].shape == (3, 128)
    (root / "snapshots" / commit / "config.json").write_text("{}")
    assert hub.here("org/cached") == root / "snapshots" / commit and hub.here(str(root)) == root
    assert hub.here("org/absent") is hub.here("nowhere") is hub.here("a--b/c") is hub.here(None) is None
    with pytest.raises(
        WeightsError, match=r"org/absent is not a folder here and not complete in the hub's cache, and HF_HUB_OFF"
    ):
        hub.pipeline("org/absent", configs_only=True)


class ReadTimeout(Exception):
    """Of the hub's HTTP library, which is another one from version to version."""


def answer(kind, status):
    return kind(f"{status} Error\nfor url", response=SimpleNamespace(status_code=status, headers={}, request=None))


def caused(e, cause):
    e.__cause__ = cause
    return e


LICENCE = f"accept the licence at {PAGE} and run `hf auth login`"
AGAIN = f"try again with network access (if it is behind a licence, {LICENCE})"
FOLDER = "or give a folder, --config.model.path=DIR"
ABSENT = f"{NAME} is not a folder here and not complete in the hub's cache"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(errors.GatedRepoError, 403), f"{NAME} is behind a licence: {LICENCE}, {FOLDER}"),
        (
            answer(errors.RepositoryNotFoundError, 401),
            f"{NAME} is not a folder here, and {PAGE} is missing or private: fix the name, or {LICENCE}, {FOLDER}",
        ),
        (
            answer(errors.HfHubHTTPError, 401),
            f"{NAME} is not a folder here, and {PAGE} is missing or private: fix the name, or {LICENCE}, {FOLDER}",
        ),
        (
            answer(errors.HfHubHTTPError, 503),
            f"{NAME} cannot be fetched (the hub answers 503): {AGAIN}, {FOLDER}",
        ),
        (
            caused(errors.LocalEntryNotFoundError("no"), answer(errors.HfHubHTTPError, 500)),
            f"{NAME} cannot be fetched (the hub answers 500): {AGAIN}, {FOLDER}",
        ),
        (
            errors.HFValidationError("Repo id must\nbe"),
            f"{NAME} is not a folder here, nor a valid name on https://huggingface.co: give org/name, "
            "or a folder, --config.model.path=DIR",
        ),
        (
            errors.OfflineModeIsEnabled("offline"),
            f"{ABSENT}, and HF_HUB_OFFLINE is set: {AGAIN}, {FOLDER}",
        ),
        (
            caused(errors.LocalEntryNotFoundError("no"), errors.OfflineModeIsEnabled("offline")),
            f"{ABSENT}, and HF_HUB_OFFLINE is set: {AGAIN}, {FOLDER}",
        ),
        (
            errors.LocalEntryNotFoundError("Got: ConnectError\nhere"),
            f"{ABSENT}, and the hub cannot be reached: {AGAIN}, {FOLDER}",
        ),
        (
            ReadTimeout("The read timed out\nhere"),
            f"{NAME} cannot be fetched (ReadTimeout: The read timed out): {AGAIN}, {FOLDER}",
        ),
        (
            OSError(28, "No space left on device"),
            f"{NAME} cannot be fetched (OSError: [Errno 28] No space left on device): {AGAIN}, " + FOLDER,
        ),
    ],
)
def test_every_failure_is_one_line_with_the_page_and_the_mend(asked, error, message):
    asked.far = error
    with pytest.raises(WeightsError) as raised:
        flux.make(config.Model(path=NAME))
    assert str(raised.value) == message and "\n" not in message
    with pytest.raises(WeightsError):  # a failure is not remembered
        hub.pipeline(NAME, configs_only=True)
    assert len(asked) == 4


def test_a_reward_by_its_name_fails_the_same_way(asked):
    asked.far = errors.LocalEntryNotFoundError("no")
    with pytest.raises(
        WeightsError, match=r"org/clip is not a folder here .* and run `hf auth login`\), or give a folder$"
    ):
        clipscore.make("org/clip")


def test_a_run_asks_for_configs_before_anything_large(asked, tmp_path):
    """A licence that was not accepted is said before CLIP or weights are fetched."""
    (tmp_path / "p.txt").write_text("\n".join(map(str, range(200))))
    asked.far = answer(errors.GatedRepoError, 401)
    made = config.load("flux", {"model.path": NAME, "prompt_files": "p.txt", "reward_paths": "clipscore=org/clip"})
    with pytest.raises(WeightsError, match="behind a licence"):
        assemble.assemble(made, 1)
    assert asked == [(SMALL, True), (SMALL, False)]


def test_a_reward_that_is_not_here_is_said_before_anything_is_fetched(asked):
    message = (
        r"unknown reward 'aesthetic' in 'clipscore,aesthetic': use one of clipscore, .*hpsv2, .*pickscore, shapes \("
    )
    with pytest.raises(ConfigError, match=message):
        assemble.assemble(config.load("flux", {"reward": "clipscore,aesthetic"}), 1)
    assert not asked


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        ("StableDiffusion3Pipeline", "no config is for it, there are flux, tiny"),
        ("SanaPipeline", "use --config=sana"),
        ("FluxFillPipeline", "no config is for it, there are flux, sana, tiny"),
        (None, "no config is for it"),
    ],
)
def test_the_pipeline_of_another_model_is_named_with_its_config(tmp_path, monkeypatch, kind, fix):
    there = ["flux", "sana", "tiny"] if "sana" in fix else ["flux", "tiny"]
    monkeypatch.setattr(config, "available", lambda: there)
    hub.write_configs(tmp_path, public.FLUX_DEV)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(WeightsError, match=rf"holds a {kind}, not a FluxPipeline: {fix}"):
        flux.make(config.Model(path=str(tmp_path)))


KLEIN, Z_IMAGE = (next(iter(x.values())) for x in (public.FLUX2, public.ZIMAGE))
WRONG = [  # (config, files, class of the pipeline, what is said with its model_index.json, and without)
    (flux2, public.FLUX_DEV, "FluxPipeline", "not a Flux2KleinPipeline: use --config=flux", "FluxTransformer2DModel"),
    (flux, KLEIN, "Flux2KleinPipeline", "not a FluxPipeline: use --config=flux2", "Flux2Transformer2DModel"),
    (
        flux2,
        KLEIN,
        "Flux2Pipeline",
        "not a Flux2KleinPipeline: no config is for it, there are emoji, flux, flux2, ",
        "",
    ),
    (zimage, KLEIN, "Flux2KleinPipeline", "not a ZImagePipeline: use --config=flux2", "Flux2Transformer2DModel"),
    (flux2, Z_IMAGE, "ZImagePipeline", "not a Flux2KleinPipeline: use --config=zimage", "ZImageTransformer2DModel"),
]


@pytest.mark.parametrize(("model", "files", "kind", "fix", "network"), WRONG)
def test_the_folder_of_one_model_given_as_another(tmp_path, model, files, kind, fix, network):
    """By the pipeline's class, and where there is no index by the network's."""
    hub.write_configs(tmp_path, files)
    cfg = config.Model(path=str(tmp_path), text_tokens=512)
    if network:
        with pytest.raises(WeightsError, match=rf"transformer holds a {network}, not a .*: use the config of that mod"):
            model.make(cfg)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(WeightsError, match=rf"holds a {kind}, {fix}"):
        model.make(cfg)


OPEN = {
    "black-forest-labs/FLUX.2-klein-base-4B": (flux2, 3_875_544_576),
    "black-forest-labs/FLUX.2-klein-4B": (flux2, 3_875_544_576),
    "black-forest-labs/FLUX.2-klein-base-9B": (flux2, 9_078_581_248),
    "black-forest-labs/FLUX.2-klein-9B": (flux2, 9_078_581_248),
    "Tongyi-MAI/Z-Image": (zimage, 6_154_908_736),
    "Tongyi-MAI/Z-Image-Turbo": (zimage, 6_154_908_736),
}


@pytest.mark.parametrize("name", OPEN)
def test_the_open_bases_by_their_public_configs(tmp_path, name):
    """Each is known, of its public size, with the part of Qwen3 that it reads; a distilled one takes no guidance."""
    module, count = OPEN[name]
    hub.write_configs(tmp_path, module.PUBLIC[name])
    cfg = config.Model(path=str(tmp_path), text_tokens=512)
    base, _, text = (sum(x.size for x in jax.tree.leaves(tree)) for tree in module.shapes(cfg))
    layers, width = (35, 2560) if module is zimage else (27, 4096 if "9B" in name else 2560)
    each = {2560: 100_930_816, 4096: 192_946_432}[width]
    assert (base, text) == (count, 151936 * width + layers * each)
    assert module.make(cfg).guidance == ("cfg" if "base" in name or name == "Tongyi-MAI/Z-Image" else "none")


REPOSITORY = {  # files of klein-base-9B: read here or not
    "model_index.json": True,
    "flux-2-klein-base-9b.safetensors": False,
    "README.md": False,
    "scheduler/scheduler_config.json": True,
    "text_encoder/config.json": True,
    "text_encoder/generation_config.json": True,
    "text_encoder/model.safetensors.index.json": True,
    **{f"text_encoder/model-0000{i}-of-00004.safetensors": True for i in (1, 2, 3, 4)},
    **{f"tokenizer/{name}": True for name in ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")},
    "tokenizer/chat_template.jinja": False,  # the templates are in qwen3.py
    "transformer/config.json": True,
    "transformer/diffusion_pytorch_model.safetensors.index.json": True,
    **{f"transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors": True for i in (1, 2)},
    "vae/config.json": True,
    "vae/diffusion_pytorch_model.safetensors": True,
}
PIECES = {
    "_class_name": "Flux2KleinPipeline",
    "is_distilled": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def klein_cache(folder):
    """The files of REPOSITORY that are read, empty but for configs and indices."""
    for file in (name for name, read in REPOSITORY.items() if read):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    hub.write_configs(folder, public.FLUX2["black-forest-labs/FLUX.2-klein-base-9B"] | {"model_index.json": PIECES})
    for index in (name for name in REPOSITORY if name.endswith(".index.json")):
        stem = index.removesuffix(".safetensors.index.json")
        named = [name.rpartition("/")[2] for name in REPOSITORY if name.startswith(f"{stem}-")]
        (folder / index).write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(named)}}))
    return folder


def test_what_is_fetched_of_a_klein(asked, tmp_path):
    """All shards and the tokenizer, not the single file in other names at the root."""
    found = {file for file in REPOSITORY if any(fnmatch.fnmatch(file, pattern) for pattern in SMALL + HEAVY)}
    assert found == {file for file, read in REPOSITORY.items() if read}
    asked.local = klein_cache(tmp_path / "cached")
    assert hub.pipeline(NAME) == asked.local and len(asked) == 1
    assert flux2.is_distilled(asked.local)
    assert {f.relative_to(asked.local).as_posix() for f in hub.read_of(asked.local)} == {
        file for file, read in REPOSITORY.items() if read and file.endswith(".safetensors")
    }


@pytest.mark.parametrize("gone", [file for file, read in REPOSITORY.items() if read and "generation" not in file])
def test_a_klein_that_was_cut_short_is_fetched(asked, tmp_path, gone):
    """tokenizer.json alone is enough for a tokenizer, and so are vocab.json and merges.txt without it."""
    asked.local = klein_cache(tmp_path / "cached")
    (asked.local / gone).unlink()
    spare = gone in ("tokenizer/merges.txt", "tokenizer/tokenizer.json", "tokenizer/vocab.json")
    assert hub.pipeline(NAME) == (asked.local if spare else tmp_path / "fetched")


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.2-klein-base-9B", "black-forest-labs/FLUX.2-klein-9B"])
def test_a_gated_klein_without_access(monkeypatch, name):
    def download(name, **how):
        raise (
            errors.LocalEntryNotFoundError("no") if how.get("local_files_only") else answer(errors.GatedRepoError, 403)
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    page = f"https://huggingface.co/{name}"
    with pytest.raises(WeightsError) as raised:
        flux2.make(config.Model(name="flux2", path=name, text_tokens=512))
    assert str(raised.value) == (
        f"{name} is behind a licence: accept the licence at {page} and run `hf auth login`, {FOLDER}"
    )


@pytest.mark.parametrize("kind", ["FluxPipeline", "FluxImg2ImgPipeline"])
def test_flux_pipelines_and_folders_without_an_index_are_taken(tmp_path, kind):
    hub.write_configs(tmp_path, public.FLUX_DEV)
    assert flux.make(config.Model(path=str(tmp_path))).name == "flux"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    assert flux.make(config.Model(path=str(tmp_path), text_tokens=64)).name == "flux"


def test_resolution_and_transformer_of_flux_dev(tmp_path):
    hub.write_configs(tmp_path, public.FLUX_DEV)
    with pytest.raises(ConfigError, match=r"model.size=500: use a multiple of 16 pixels \(VAE x8, 2x2 patches\)"):
        flux.make(config.Model(path=str(tmp_path), size=500))
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(WeightsError, match=r"transformer holds a SD3Transformer2DModel, not a FluxTransformer2DModel"):
        flux.make(config.Model(path=str(tmp_path), text_tokens=32))
