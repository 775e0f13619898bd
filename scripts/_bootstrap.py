"""A bare Python to a ready .venv: what the two README commands share. Standard library only."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".specmemo.json"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def enter(extras: tuple[str, ...] = ()) -> None:
    """Go on inside .venv, with the package and ``extras`` installed; returns only there.

    What is installed already is kept until pyproject.toml, the checkout's place or the
    Python version changes.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 (a bare Python may be older than the package allows)
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"error: Python 3.11 or newer is needed, {sys.executable} is {found}")
    version = _version()
    if not version:
        _create()
        version = _version()
    _install(version, set(extras))
    if Path(sys.prefix).resolve() != VENV.resolve():
        _restart()


def add(extras: tuple[str, ...]) -> bool:
    """Install more ``extras`` into .venv where the package index has them; says so where it has not."""
    try:
        _install(_version(), set(extras))
    except SystemExit as refused:
        # Without them as before, and asked for anew the next time.
        print(f"{refused}; going on without {', '.join(extras)}", file=sys.stderr, flush=True)
        return False
    return True


def add_wheels(*arguments: str) -> bool:
    """Install packages into .venv beside the project's own, where the package index has them; says so where
    it has not.
    """
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "-qq", *arguments]
    done = subprocess.run(command, env={**os.environ, "PIP_USER": "0"}, check=False)
    if done.returncode:
        print(f"pip could not install {' '.join(arguments)}; going on without", file=sys.stderr, flush=True)
    return not done.returncode


def _version() -> str:
    """The version of the interpreter in .venv; empty when there is none that runs and is new enough."""
    if not PYTHON.exists():
        return ""
    ask = "import sys; print(sys.version if sys.version_info >= (3, 11) else '')"
    try:
        return subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _create() -> None:
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"error: {sys.executable} has no {error.name}, so it cannot make a virtual environment; "
            f"the package python{version}-venv (Debian, Ubuntu), or another Python {version}, works"
        )
    if VENV.exists():
        if not (VENV / "pyvenv.cfg").exists() and any(VENV.iterdir()):
            sys.exit(f"error: {VENV} is there but is no virtual environment; moving it away works")
        shutil.rmtree(VENV)
    print(f"making {VENV}", file=sys.stderr, flush=True)
    try:
        venv.create(VENV, with_pip=True, symlinks=os.name != "nt")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: cannot make {VENV}: {error}")


def _install(version: str, extras: set[str]) -> None:
    basis = [(ROOT / "pyproject.toml").read_bytes(), str(ROOT).encode(), version.encode()]
    digest = hashlib.sha256(b"\0".join(basis)).hexdigest()
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        stamp = {"digest": None, "extras": []}
    if stamp["digest"] == digest and extras <= set(stamp["extras"]):
        return
    wanted = sorted(extras | set(stamp["extras"]))
    target = f"{ROOT}[{','.join(wanted)}]" if wanted else str(ROOT)
    print("installing into .venv (the first time takes minutes)", file=sys.stderr, flush=True)
    STAMP.unlink(missing_ok=True)
    if subprocess.run([PYTHON, "-c", "import pip"], stderr=subprocess.DEVNULL, check=False).returncode:
        subprocess.run([PYTHON, "-m", "ensurepip"], stdout=subprocess.DEVNULL, check=False)
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--editable", target]
    # Installing into the user's folders is refused inside a virtual environment.
    done = subprocess.run(command, env={**os.environ, "PIP_USER": "0"}, check=False)
    if done.returncode:
        sys.exit(f"error: pip could not install {target}; its own message stands above")
    STAMP.write_text(json.dumps({"digest": digest, "extras": wanted}))


def _restart() -> None:
    command = [str(PYTHON), *sys.argv]
    sys.stdout.flush()
    if os.name == "nt":  # there, exec returns to the shell before the new process has ended
        sys.exit(subprocess.run(command, check=False).returncode)
    os.execv(command[0], command)
