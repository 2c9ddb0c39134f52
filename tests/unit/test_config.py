"""Settings: all mistakes at once, by dotted path; which source wins; what is saved."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from samray.config import Config, load_config, required, save_config
from samray.errors import ConfigError, StorageError

_FOLDER = Path(__file__).parents[2] / "configs"
_OTHERS = ("serve", "cluster")  # Ray's own
CONFIGS = sorted(path for path in _FOLDER.glob("*.yaml") if path.stem not in _OTHERS)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def message_of(*args: object, **kwargs: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_three_mistakes_are_reported_at_once_with_dotted_paths(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {batch_size: 0, seed: many}\nmodel: {type: vit_g}\n")
    message = message_of(path)
    assert message.startswith(f"{path}: ")
    assert "train.batch_size: Input should be greater than or equal to 1 (got 0)" in message
    assert "train.seed: " in message
    assert "(got 'many')" in message
    assert "model.type: " in message
    assert "'vit_h'" in message  # a valid value
    assert message.count("; ") == 2


def test_mistakes_in_words_options_and_values_are_reported_together() -> None:
    message = message_of(
        None, ["train.seed", "train.num_epochs=[1"], {"train.learning_rate": "quick"}
    )
    assert "'train.seed' is not of the form section.key=value" in message
    assert "train.num_epochs: while parsing" in message
    assert "train.learning_rate: " in message


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("train:\n  seed: 1\nmodel: {type: tiny}\ntrain:\n  batch_size: 8\n", "train", 4),
        ("train:\n  seed: 1\n  seed: 2\n", "seed", 3),
    ],
)
def test_what_is_given_twice_is_refused_with_its_line(
    text: str, key: str, line: int, tmp_path: Path
) -> None:
    message = message_of(write(tmp_path, text))
    assert message.endswith(f"line {line}: {key} is there twice; join the two")
    assert "a is there twice" in message_of(None, ["tune.search_space={a: 1, a: 2}"])


def test_a_key_that_replaces_one_of_an_anchor_is_there_once(tmp_path: Path) -> None:
    space = "{<<: *some, seed: 3}"
    path = write(tmp_path, f"train: &some {{seed: 1}}\ntune: {{search_space: {space}}}\n")
    assert load_config(path).tune.search_space == {"seed": 3}


def test_a_refusal_of_the_server_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> bytes:
        raise StorageError(f"{path}: no permission")

    monkeypatch.setattr("samray.config.read_bytes", refuse)
    with pytest.raises(StorageError, match="no permission"):
        load_config("s3://bucket/config.yaml")


def test_unknown_key_names_the_valid_ones_and_the_closest() -> None:
    message = message_of(None, ["scaling.num_worker=2"])
    assert "scaling.num_worker is not a setting (did you mean num_workers?)" in message
    assert "scaling has num_workers, device, cpus_per_worker" in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepare.labels=cat"], "prepare.labels: should be a list, such as [cat] (got 'cat')"),
        (["predict.box=3"], "predict.box: should be a list (got 3)"),
        (["prepare=[1, 2]"], "prepare: should be settings by name (got [1, 2])"),
        (["tune.search_space=3"], "tune.search_space: should be settings by name (got 3)"),
        (["prepare.overlap=10"], "prepare: overlap is for tiles; add prepare.tile (--tile)"),
    ],
)
def test_messages_are_in_the_words_of_the_user(words: list[str], said: str) -> None:
    assert message_of(None, words) == f"config: {said}"


def test_unknown_section_names_the_valid_ones_and_the_closest() -> None:
    message = message_of(None, ["trian.seed=2"])
    assert "trian is not a setting (did you mean train?); a config has sample_data, " in message


def test_options_win_over_words_and_words_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {seed: 1, batch_size: 3, num_epochs: 7}\n")
    words = ["train.seed=2", "train.batch_size=4", "train.batch_size=5"]
    train = load_config(path, words, {"train.seed": 6}).train
    assert (train.seed, train.batch_size, train.num_epochs) == (6, 5, 7)
    assert train.warmup_steps == Config().train.warmup_steps


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001"])
def test_learning_rate_may_be_written_as_1e_5_which_yaml_reads_as_text(
    text: str, tmp_path: Path
) -> None:
    assert load_config(None, [f"train.learning_rate={text}"]).train.learning_rate == 1e-5
    path = write(tmp_path, f"train: {{learning_rate: {text}}}\n")
    assert load_config(path).train.learning_rate == 1e-5


@pytest.mark.parametrize("text", [".inf", ".nan", "-1", "0"])
def test_invalid_learning_rate_is_refused(text: str) -> None:
    assert "train.learning_rate" in message_of(None, [f"train.learning_rate={text}"])


@pytest.mark.parametrize(
    ("text", "kept", "least", "most"),
    [
        ("3", 3, 3, 3),
        ("'3'", 3, 3, 3),
        ("2..8", "2..8", 2, 8),
        ("2 .. 8", "2..8", 2, 8),
        ("4..4", 4, 4, 4),
    ],
)
def test_workers_are_a_number_or_a_range(
    text: str, kept: object, least: int, most: int, tmp_path: Path
) -> None:
    config = load_config(None, [f"scaling.num_workers={text}"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    scaling = config.scaling
    assert (scaling.num_workers, scaling.min_workers, scaling.max_workers) == (kept, least, most)


@pytest.mark.parametrize("text", ["0", "-1", "0..2", "3..2", "2..", "[2, 8]", "true", "2.5", "two"])
def test_a_wrong_number_of_workers_is_refused(text: str) -> None:
    message = message_of(None, [f"scaling.num_workers={text}"])
    assert message.startswith("config: scaling.num_workers: must be a number of at least 1, or MIN")
    assert "; " not in message


def test_config_cannot_be_changed_after_it_is_saved() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.train.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.train = config.train


def test_saved_config_repeats_the_run(tmp_path: Path) -> None:
    words = [
        "train.learning_rate=1e-5",
        "prepare.labels=[Straße, cat]",
        "prepare.group_by='(\\d+)_'",
        "predict.points=[[1, 2], [3.5, 4]]",
        "predict.box=[0, 1, 2, 3]",
        "model.freeze_image_encoder=false",
    ]
    config = load_config(None, words)
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again.prepare.labels == ("Straße", "cat")
    assert again.predict.points == ((1, 2), (3.5, 4))


def test_required_names_each_missing_setting_as_option_and_as_setting() -> None:
    config = load_config(None, ["train.output_dir=''"])
    with pytest.raises(ConfigError) as caught:
        required(config, "train.data_dir", "train.output_dir")
    assert str(caught.value) == (
        "missing --data-dir (or train.data_dir=...) and --output-dir (or train.output_dir=...)"
    )


def test_required_gives_the_values_in_order() -> None:
    config = load_config(None, ["train.data_dir=a", "train.output_dir=b"])
    assert required(config, "train.output_dir", "train.data_dir") == ["b", "a"]


def test_there_are_configs_to_load() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_loads(path: Path) -> None:
    assert load_config(path) != Config()


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (0.9, 0.2)])
def test_fractions_that_leave_nothing_to_train_on_are_refused(val: float, test: float) -> None:
    words = [f"prepare.val_fraction={val}", f"prepare.test_fraction={test}"]
    assert "val_fraction + test_fraction must be below 1" in message_of(None, words)


def test_fractions_just_below_one_are_taken() -> None:
    config = load_config(None, ["prepare.val_fraction=0.5", "prepare.test_fraction=0.49"])
    assert config.prepare.test_fraction == 0.49


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- train\n- model\n", "must hold sections such as `train:`, not a list"),
        (b"just words\n", "not a str"),
        (b"train: [1\nmodel: {\n", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"[" * 20_000, "is not YAML"),
        (b"2024-99-99: 1\n", "is not YAML: month must be in 1..12"),
        (b"train: 3\n", "train is not a section"),
        (b"1: 2\n", "Keys should be strings"),
    ],
    ids=[
        "list",
        "text",
        "broken",
        "binary",
        "deep",
        "no-such-date",
        "number-as-section",
        "number-as-key",
    ],
)
def test_file_that_is_no_config_gives_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    message = message_of(path, options={"train.seed": 1})
    assert message.startswith(f"{path}: ")
    assert said in message


@pytest.mark.parametrize("name", ["missing.yaml", ""])
def test_missing_file_or_folder_gives_one_line(name: str, tmp_path: Path) -> None:
    assert "cannot be read" in message_of(tmp_path / name)


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n  # seed: 3\n"])
def test_empty_file_or_section_means_the_defaults(text: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, text)) == Config()
