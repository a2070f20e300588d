"""Configurations: defaults, sections, and one line for whatever is wrong."""

import pytest

from mmkern.training.config import ConfigError, parse, read


def test_a_file_sets_what_it_names_and_paths_are_relative_to_it(tmp_path):
    (tmp_path / "pictures").mkdir()
    file = tmp_path / "run.toml"
    file.write_text('[model]\nwidth = 64\n[data]\nsource = "pictures"\n[training]\nsteps = 7\nbetas = [0.8, 0.9]\n')
    config = read(file)
    assert config.model.width == 64
    assert config.model.heads == parse({}).model.heads
    assert config.data.source == str(tmp_path / "pictures")
    assert (config.training.steps, config.training.betas) == (7, (0.8, 0.9))
    built = config.model.build(vocab_size=300, classes=5, pad=4)
    assert (built.vocab_size, built.classes, built.pad, built.width) == (300, 5, 4, 64)


def test_a_dump_reads_back_the_same():
    config = parse({"training": {"weights": {"class": 0.5}, "teacher": "runs/a"}, "data": {"tasks": ["name"]}})
    assert parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"training": {"learning_rat": 1}}, "unknown key training.learning_rat; did you mean training.learning_rate?"),
        ({"modle": {}}, "unknown key modle; did you mean model?"),
        ({"xyz": {}}, "unknown key xyz; known: model, data, training"),
        ({"model": {"vocab_size": 3}}, "model.vocab_size: is not set here: data, tokenizer and weights tell"),
        ({"model": {"width": 130}}, "model.width: expected a multiple of 4 and of heads = 4, got 130"),
        ({"model": {"similarity": "l2"}}, "model.similarity: expected one of dot, cosine"),
        ({"training": {"clip": -1}}, "training.clip: input should be greater than or equal to 0, got -1"),
        (
            {"training": {"optimizer": "lion"}},
            "training.optimizer: input should be 'sgd', 'adam' or 'adamw', got 'lion'",
        ),
        ({"training": {"schedule": "cosin"}}, "training.schedule: input should be 'constant', 'step', 'cosine', "),
        ({"training": {"weights": {"txt": 1}}}, "training.weights.txt"),
    ],
)
def test_a_wrong_key_or_value_is_one_line(values, line):
    with pytest.raises(ConfigError) as caught:
        parse(values, "run.toml")
    assert str(caught.value).startswith(f"run.toml: {line}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "line"), [(None, "cannot be read (No such file"), ("a = = 1", "is no TOML")])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, text, line):
    file = tmp_path / "run.toml"
    if text:
        file.write_text(text)
    with pytest.raises(ConfigError, match="run.toml: " + line.replace("(", r"\(")):
        read(file)
