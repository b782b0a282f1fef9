import re

import pytest

from tests.launch import run_python
from trainer.config.io import CONFIG_FOLDER, config_names, load_config
from trainer.config.resume import diff_configs
from trainer.config.train_config import split_batch

AUTHORS = {
    # GPUs, batch per GPU, images, epochs, T, width, multipliers, mapping layers, lr_g, lr_d, r1_gamma, lazy_reg, EMA, D
    "cifar10": (4, 64, 50_000, 1800, 4, 128, (1, 2, 2, 2), 4, 1.6e-4, 1.25e-4, 0.02, 15, 0.9999, "small"),
    "celebahq256": (8, 4, 30_000, 800, 2, 64, (1, 1, 2, 2, 4, 4), 3, 2e-4, 1e-4, 2.0, 10, 0.9999, "large"),
    "lsun256": (8, 8, 120_000, 500, 4, 64, (1, 1, 2, 2, 4, 4), 3, 1.6e-4, 1e-4, 1.0, 10, 0.999, "large"),
}


def test_there_is_a_config_for_each_data_set():
    assert config_names() == [
        "celebahq1024",
        "celebahq256",
        "celebahq256-haar",
        "celebahq512",
        "cifar10",
        "cifar10-fast",
        "digits",
        "digits-fast",
        "digits4x",
        "gaussians25",
        "lsun256",
        "lsun256-haar",
        "pairs256",
        "stackedmnist",
        "stackedmnist16",
        "stackedmnist16-denoiser",
    ]


def test_reading_and_checking_them_imports_no_compiler():
    """Importing it takes longer than all that a command does before it refuses a mistake."""
    program = (
        "import sys; from trainer.config.io import config_names, load_config; "
        "[load_config(name) for name in config_names()]; "
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy') if name in sys.modules])"
    )
    done = run_python(["-c", program])
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize("name", config_names())
def test_config_loads_and_names_its_own_folders(name):
    config = load_config(name)
    assert config.run.directory == f"runs/{name}"
    assert config.data.path == f"datasets/{name.partition('-')[0]}"  # a variant has the data of its config
    assert (CONFIG_FOLDER / f"{name}.yaml").read_text().startswith("# yaml-language-server: $schema=schema.json\n# ")


@pytest.mark.parametrize("name", AUTHORS)
def test_config_holds_the_row_of_the_authors_table(name):
    gpus, per_gpu, images, epochs, steps_t, width, multipliers, mapping, lr_g, lr_d, gamma, lazy, ema, kind = AUTHORS[
        name
    ]
    config = load_config(name)
    assert config.training.total_images == images * epochs
    assert config.scaling.world_size == gpus
    assert split_batch(config).micro_batch_size == per_gpu
    assert config.diffusion.num_timesteps == steps_t
    generator = config.generator
    assert (generator.base_channels, generator.channel_multipliers) == (width, multipliers)
    assert generator.num_mapping_layers == mapping
    assert (config.training.learning_rate_g.peak, config.training.learning_rate_d.peak) == (lr_g, lr_d)
    assert (config.training.r1_gamma, config.training.r1_interval_steps, config.training.ema_decay) == (
        gamma,
        lazy,
        ema,
    )
    assert config.discriminator.kind == kind
    # What the table says of all of them.
    assert (generator.num_res_blocks, generator.attention_resolutions) == (2, (16,))
    assert (generator.latent_dim, generator.latent_embedding_dim) == (100, 256)
    assert (config.discriminator.base_channels, config.discriminator.time_embedding_dim) == (64, 256)
    assert (config.diffusion.schedule, config.diffusion.beta_min, config.diffusion.beta_max) == ("vp", 0.1, 20.0)
    assert (config.training.adam.beta1, config.training.adam.beta2) == (0.5, 0.9)
    assert config.training.learning_rate_g.final == config.training.learning_rate_d.final == 1e-5
    assert config.data.horizontal_flip
    assert config.data.image_channels == 3


@pytest.mark.parametrize("name", config_names())
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_global_batch_is_the_same_on_any_of_the_usual_world_sizes(name, world_size):
    split = split_batch(load_config(name, [f"scaling.world_size={world_size}"]))
    assert split.global_batch_size == split_batch(load_config(name)).global_batch_size
    assert split.micro_batch_size % 4 == 0


@pytest.mark.parametrize("name", ["digits", "stackedmnist", "stackedmnist16", "stackedmnist16-denoiser"])
def test_digits_are_never_mirrored(name):
    assert not load_config(name).data.horizontal_flip


@pytest.mark.parametrize("name", ["digits", "stackedmnist16", "stackedmnist16-denoiser"])
def test_small_configs_run_on_two_cpu_cores(name):
    scaling = load_config(name).scaling
    assert (scaling.device, scaling.world_size, scaling.cpus_per_worker) == ("cpu", 2, 1)


GAMES = re.findall(
    r"^\| ([^|]+) \| `(--set [^|]+)` \|$", (CONFIG_FOLDER.parents[1] / "docs/method.md").read_text(), re.M
)


@pytest.mark.parametrize(("game", "options"), GAMES, ids=[game for game, _ in GAMES])
def test_published_games_of_the_docs_are_settings(game, options):
    sets = [option.strip() for option in options.split("--set ")[1:]]
    config = load_config("cifar10", sets)
    assert diff_configs(load_config("cifar10"), config), f"{game} changes nothing"


def test_docs_name_the_published_games():
    assert len(GAMES) == 5
