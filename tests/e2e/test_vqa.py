"""Questions about images: federations with the base model at the clients and behind a cut."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from e2e_helpers import Launcher, read_summary, write_rows
from safetensors.numpy import load_file
from vqa_files import QUESTIONS, SITES, TESTED

ROUNDS, STEPS, BATCH = 2, 3, 4


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    made = Launcher(tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("outputs"))
    yield made
    made.end_all()


class Runs:
    """Simulations of one federation that differ in some keys; each is run once."""

    def __init__(self, launcher: Launcher, base: Path, questions: Path) -> None:
        self._launcher, self._base, self._questions = launcher, base, questions

    def __call__(self, *overrides: str) -> Path:
        return self.of(self._questions, *overrides)

    def of(self, questions: Path, *overrides: str) -> Path:
        """One of other sites."""
        name = re.sub(r"\W+", "-", " ".join([questions.name, *overrides]))
        path = self._launcher.folder / name
        if not path.exists():
            sets = [f"train.steps={STEPS}", f"train.batch-size={BATCH}", "adapter.rank=4"]
            sets += ["data.min-examples=1", "update.clip=unset", "update.bits=unset"]
            sets += ["secagg.enabled=false", "split.activations=float32", *overrides]
            flags = [part for override in sets for part in ("--set", override)]
            code, command = self._launcher.run(
                *("simulate", "--preset", "vqa", "--data", questions),
                *("--base", self._base, "--rounds", str(ROUNDS), "--workers", "2", "--out", name),
                *flags,
            )
            assert code == 0, command.stderr
        return path


@pytest.fixture(scope="module")
def runs(launcher: Launcher, answering_decoder: Path, questions: Path) -> Runs:
    return Runs(launcher, answering_decoder, questions)


def adapter_of(run: Path) -> np.ndarray:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])


@pytest.mark.parametrize("labels", ["server", "client"])
def test_behind_a_cut_the_same_is_learned(runs: Runs, labels: str) -> None:
    whole = adapter_of(runs("base.placement=client"))
    split = adapter_of(runs(f"split.labels={labels}"))
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(split, whole, atol=1e-4)


def test_a_gray_box_learns_the_same_behind_a_cut(runs: Runs) -> None:
    whole = runs("adapter.output-rank=4", "base.placement=client")
    split = runs("adapter.output-rank=4", "split.labels=client")
    assert np.abs(adapter_of(whole)).max() > 0.1
    np.testing.assert_allclose(adapter_of(split), adapter_of(whole), atol=1e-4)
    trained = SITES * ROUNDS * STEPS * BATCH
    cut = read_summary(split)["cut"]
    # A state down and its gradient up are all that is there beside the tokens.
    assert cut["bytes_up"] == cut["bytes_down"] == (cut["tokens"] + trained) * 64 * 4
    assert cut["floor"] == cut["bytes_up"] + cut["bytes_down"]


def test_a_ladder_learns_from_what_crosses_the_cut_once(runs: Runs) -> None:
    longer = ("adapter.kind=ladder", "adapter.rungs=2", "train.steps=20", "aggregate.rule=fedavg")
    split = read_summary(runs(*longer, "train.lr=0.01"))
    base = next(r for r in split["references"] if r["name"] == "base")
    assert split["final"]["accuracy"] > base["accuracy"] + 0.15
    cut = split["cut"]
    assert cut["examples"] == SITES * QUESTIONS  # of 4 × 2 × 20 × 4 that were trained on
    assert cut["bytes_up"] == cut["tokens"] * 64 * 4
    assert cut["bytes_down"] == 2 * SITES * QUESTIONS * 64 * 4
    assert cut["floor"] == cut["bytes_up"] + cut["bytes_down"]
    assert cut["evaluated"] == TESTED  # twice, and asked for once
    assert cut["labels_at"] == "client"
    whole = read_summary(runs(*longer, "train.lr=0.01", "base.placement=client"))
    assert whole["cut"] is None
    assert whole["final"]["loss"] == pytest.approx(split["final"]["loss"], abs=0.02)


def test_coarser_activations_learn_nearly_the_same_and_say_what_they_cost(runs: Runs) -> None:
    exact, coarse = runs("split.labels=server"), runs("split.activations=int8")
    difference = np.linalg.norm(adapter_of(exact) - adapter_of(coarse))
    assert 0 < difference < 0.5 * np.linalg.norm(adapter_of(exact))
    trained = SITES * ROUNDS * STEPS * BATCH
    for run, each in ((exact, 64 * 4), (coarse, 64 + 4)):
        cut = read_summary(run)["cut"]
        assert cut["examples"] == trained
        assert cut["floor"] == 2 * cut["tokens"] * each
        # An answer up and a loss down are all that is there beside the tokens.
        assert cut["bytes_up"] == cut["tokens"] * each + 4 * trained
        assert cut["bytes_down"] == cut["tokens"] * each + 4 * trained
        # Before the first round and after the last.
        assert cut["evaluated"] == 2 * TESTED
    assert read_summary(runs("base.placement=client"))["cut"] is None


def tensors_of(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_who_has_only_texts_or_only_images_trains_what_it_has(
    runs: Runs, questions: Path, tmp_path: Path
) -> None:
    """Fisher merging gives each a say in what it knows of; averaging lets all have one."""
    lacks = {"site-0": (), "site-1": ("question",), "site-2": ("image",)}
    without, together = tmp_path / "without-texts", tmp_path / "together"
    for folder in (without, together):
        for site, keys in lacks.items():
            if (folder, site) == (without, "site-2"):
                continue
            lines = (questions / site / "train.jsonl").read_text().splitlines()
            rows = [json.loads(line) | dict.fromkeys(keys, "") for line in lines]
            write_rows(folder / site / "train.jsonl", rows)
        for file in ("test.jsonl", "captions.jsonl"):
            shutil.copy(questions / file, folder)
    one = ("rounds.count=1", "train.steps=4")
    alone, fisher = (tensors_of(runs.of(folder, *one)) for folder in (without, together))
    average = tensors_of(runs.of(together, *one, "aggregate.rule=fedavg"))
    for name, expected in alone.items():
        if name.startswith("nano_image"):
            # The site without images changes nothing of what is done with images ...
            np.testing.assert_allclose(fisher[name], expected, atol=1e-6)
            assert name.endswith("down.bias") or np.abs(average[name] - expected).max() > 1e-4
        else:
            # ... and has its say in what is done with words.
            assert np.abs(fisher[name] - expected).max() > 1e-5


def test_without_gradients_at_the_client_the_loss_falls_too(runs: Runs) -> None:
    run = runs(
        *("train.method=forward-only", "train.optimizer=sgd", "train.lr=30.0"),
        *("train.max-grad-norm=unset", "train.directions=64", "train.probes=64"),
        *("train.perturbation=0.01", "train.steps=10", "aggregate.rule=fedavg"),
    )
    summary = read_summary(run)
    base = next(r for r in summary["references"] if r["name"] == "base")
    assert summary["final"]["loss"] < base["loss"] - 0.02
    # What travels is one number a direction; what passes the cut is one exchange a step.
    assert summary["bytes_up_per_client_round"] < 1500
    assert summary["cut"]["examples"] == SITES * ROUNDS * 10 * BATCH


def test_what_the_report_shows(runs: Runs, questions: Path) -> None:
    run = runs("split.labels=server")
    summary, page = read_summary(run), (run / "report.html").read_text()
    asked = {
        (row["question"], row["answer"])
        for row in map(json.loads, (questions / "test.jsonl").read_text().splitlines())
    }
    assert len(summary["samples"]) >= 6
    for sample in summary["samples"]:
        assert (sample["question"], sample["answer"]) in asked
        assert {sample["before"], sample["after"]} <= set(summary["labels"])
        assert sample["image"] in page
    base = next(r for r in summary["references"] if r["name"] == "base")
    assert base["loss"] > summary["final"]["loss"]
    assert "What passed the cut" in page
    assert [client["examples"] for client in summary["per_client"]] == [QUESTIONS] * SITES


def test_eval_says_again_what_the_run_said(
    runs: Runs, launcher: Launcher, questions: Path, tmp_path: Path
) -> None:
    run = runs("split.labels=server")
    code, command = launcher.run("eval", run, "--data", questions / "test.jsonl", "--json")
    assert code == 0, command.stderr
    found, final = json.loads(command.stdout), read_summary(run)["final"]
    assert found["examples"] == TESTED
    assert found["accuracy"] == pytest.approx(final["accuracy"])
    assert found["loss"] == pytest.approx(final["loss"], abs=1e-4)
    code, command = launcher.run("export", run, "--out", tmp_path / "merged")
    assert code == 2
    assert "neither merged nor peft's" in command.stderr


def test_a_connector_is_pretrained_by_command_and_named_by_its_digest(
    launcher: Launcher, runs: Runs, answering_decoder: Path, questions: Path
) -> None:
    arguments = ("nano", "pretrain-connector", "--base", answering_decoder, "--steps", "20")
    captions = ("--data", questions / "captions.jsonl")
    code, command = launcher.run(*arguments, *captions, "-o", "own.safetensors", "--json")
    assert code == 0, command.stderr
    told = json.loads(command.stdout)
    path = launcher.folder / "own.safetensors"
    assert told["bytes"] == path.stat().st_size
    run = runs(f"base.connector={path}", f"base.connector-digest={told['digest']}")
    assert (run / "adapter" / "connector.safetensors").read_bytes() == path.read_bytes()

    code, command = launcher.run(*arguments, *captions, "-o", "own.safetensors")
    assert (code, "exists already" in command.stderr) == (2, True)
    code, command = launcher.run(
        *("simulate", "--preset", "vqa", "--data", questions, "--base", answering_decoder),
        *("--set", f"base.connector={path}", "--set", f"base.connector-digest={'0' * 64}"),
    )
    assert code == 2
    assert "this is another connector" in command.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter.kind=lora"], "go together"),
        (["adapter.dropout=0.1"], "adapter.dropout is for adapter.kind = lora"),
        (["adapter.kind=ladder", "adapter.rungs=3"], "2 layers known, adapter.rungs = 3"),
        (["base.pooling=cls"], "base.pooling is for base.task = text-classification"),
        (["privacy.unit=record", "privacy.epsilon=3"], "not built for adapter.kind = nano"),
        (["data.partition=iid"], "is divided already"),
        (["data.clients=7"], "has 4 client folders"),
        (["base.max-length=4"], "has more than base.max-length = 4 tokens"),
        (["data.labels=['yes', 'no']"], "is not one of the given answers"),
    ],
)
def test_what_does_not_go_together_is_refused(
    launcher: Launcher,
    answering_decoder: Path,
    questions: Path,
    overrides: list[str],
    said: str,
) -> None:
    sets = [part for override in overrides for part in ("--set", override)]
    code, command = launcher.run(
        *("simulate", "--preset", "vqa", "--data", questions, "--base", answering_decoder), *sets
    )
    assert code == 2, command.stdout
    assert said in command.stderr
    assert "Traceback" not in command.stderr


def test_a_private_adapter_stays_at_its_site_on_either_side_of_a_cut(runs: Runs) -> None:
    private = 'adapter.private=["nano_text"]'
    whole, split = runs("base.placement=client", private), runs("split.labels=server", private)
    tensors = load_file(split / "adapter" / "adapter_model.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {"nano_image"}
    np.testing.assert_allclose(adapter_of(split), adapter_of(whole), atol=1e-4)
    summary, common = read_summary(split), read_summary(runs("split.labels=server"))
    # Fewer values travel, of two matrices as large as those that stay; as many pass the cut.
    sent = summary["bytes_up_per_client_round"] / common["bytes_up_per_client_round"]
    assert 0.5 < sent < 0.6
    assert summary["cut"]["bytes_up"] == common["cut"]["bytes_up"]
    # Before the first round, after the last, and then with each site's own.
    assert summary["cut"]["evaluated"] == (2 + SITES) * TESTED
    own = [client["personal_accuracy"] for client in summary["per_client"]]
    beside = [client["personal_accuracy"] for client in read_summary(whole)["per_client"]]
    assert own == beside
