"""A CNI plug-in that does what its configuration tells it to, good or bad. Standard library only.

"log": PATH             each call is appended there: verb, variables, configuration
"on": {VERB: DEED}      what to do instead of answering well
"result": {...}         what ADD prints; without it, the prevResult or an empty result
"real": PATH            a real plug-in that does the work; its answer is passed on
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    verb = os.environ["CNI_COMMAND"]
    conf: dict[str, Any] = json.loads(sys.stdin.read())
    deed = conf.get("on", {}).get(verb, "")
    if "while" in conf and not Path(conf["while"]).exists():
        deed = ""
    if "log" in conf:
        variables = {name: value for name, value in os.environ.items() if name.startswith("CNI_")}
        line = json.dumps({"verb": verb, "plugin": sys.argv[1], "variables": variables, "conf": conf})
        with Path(conf["log"]).open("a") as log:
            log.write(line + "\n")
    if deed == "kill-daemon-before":
        os.kill(os.getppid(), signal.SIGKILL)
        return 1
    answer = work(verb, conf)
    if deed == "kill-daemon-after":
        os.kill(os.getppid(), signal.SIGKILL)
    if deed and deed != "kill-daemon-after":
        return misbehave(deed)
    sys.stdout.write(answer)
    return 0


def work(verb: str, conf: dict[str, Any]) -> str:
    if "real" in conf:
        inner = {name: value for name, value in conf.items() if name not in ("on", "real", "log")}
        inner["type"] = Path(conf["real"]).name
        done = subprocess.run([conf["real"]], input=json.dumps(inner), capture_output=True, text=True)
        if done.returncode:
            sys.stdout.write(done.stdout)
            sys.exit(done.returncode)
        return done.stdout
    if verb != "ADD":
        return ""
    if "inside" in conf:
        netns = f"--net={os.environ['CNI_NETNS']}"
        subprocess.run(["nsenter", netns, "sh", "-ec", conf["inside"]], check=True)
    return json.dumps(conf.get("result") or conf.get("prevResult") or {"cniVersion": conf["cniVersion"]})


def misbehave(deed: str) -> int:
    if deed in ("fail", "fail-after"):
        sys.stderr.write("some words for the log\n")
        error = {"cniVersion": "1.0.0", "code": 103, "msg": "the lamp is dark", "details": "no oil"}
        print(json.dumps(error))
        return 1
    if deed == "hang":
        # with a child in the same pipes, as shell scripts have
        subprocess.Popen(["sleep", "1000"])
        time.sleep(1000)
    if deed == "rubbish":
        print("warning: all is fine\n{]")
        return 0
    if deed == "rubbish-fail":
        print("panic: index out of range")
        return 2
    if deed == "flood":
        while True:
            sys.stdout.write("x" * 65536)
    if deed == "flood-errors":
        while True:
            sys.stderr.write("x" * 65536)
    if deed == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if deed == "leave-child":
        subprocess.Popen(["sleep", "3"])
        print(json.dumps({"cniVersion": "1.0.0"}))
        return 0
    raise SystemExit(f"no such deed: {deed}")


if __name__ == "__main__":
    sys.exit(main())
