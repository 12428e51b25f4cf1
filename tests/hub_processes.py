"""Processes that push to and pull from a Hub on the loopback interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

from loopback_hub import Account, LoopbackHub

TESTS = Path(__file__).parent


WRITER, READER, STRANGER, WRONG = "hf_writer_token", "hf_reader_token", "hf_stranger_token", "hf_wrong_token"


ACCOUNTS = {
    WRITER: Account("writer", ("org",)),
    READER: Account("reader", ("org",), can_write=False),
    STRANGER: Account("stranger"),
}


CARD = "---\nlicense: apache-2.0\n---\n# A tiny model\n"


def environment(hub_url: str, home: Path, token: str | None) -> dict[str, str]:
    """A process's own Hugging Face home, and this Hub instead of the real one."""
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    wanted = {
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "300",
        "NO_COLOR": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    return inherited | wanted | ({"HF_TOKEN": token} if token else {})


class Worker:
    """A process that answers calls; see scripts/hub_worker.py."""

    def __init__(self, hub: LoopbackHub, folder: Path, token: str | None):
        folder.mkdir()
        self.said = folder / "stderr"
        self.answers: list[str] = []
        with self.said.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(TESTS / "scripts" / "hub_worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=folder,
                env=environment(hub.url, folder / "home", token),
            )

    def __call__(self, name: str, *args: object, **options: object) -> dict:
        call = {"name": name, "args": [str(arg) for arg in args], "options": options}
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.said.read_text()[-2000:]
        self.answers.append(line)
        return json.loads(line)

    def result(self, name: str, *args: object, **options: object) -> object:
        """The result of a call that must not fail."""
        answer = self(name, *args, **options)
        assert "error" not in answer, answer
        return answer["result"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
