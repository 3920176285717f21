"The project's own files agree with each other, and the built wheel holds what the package needs."
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from configparser import ConfigParser
from email import message_from_bytes
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from adaptive_at.tables.parameters import TABLES

ROOT = Path(__file__).resolve().parent.parent
ABSOLUTE = re.compile(r"(?<![\w.~$}/-])/(?:root|home|work|Users)/\w")  # a place on somebody's machine


@pytest.fixture(scope="module")
def config():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def project_files():
    "The files git tracks, and the new ones it would."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return sorted(p for p in {ROOT / name for name in listed.stdout.split("\0") if name} if p.is_file())


def test_environment_yml_lists_the_requirements_of_settings_ini(config):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == shlex.split(config["requirements"]) + shlex.split(config["dev_requirements"]) + ["-e ."]


def test_constraints_name_one_version_each_that_the_requirements_admit(config):
    "And no hash: one would make pip demand hashes of everything, which `-e .` cannot have."
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line) for line in lines), lines
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pinned) == len(lines)
    for text in shlex.split(config["requirements"]) + shlex.split(config["dev_requirements"]):
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), text


def test_nbdev_3_reads_in_pyproject_toml_what_nbdev_2_reads_in_settings_ini(config):
    "And setup.py alone says what the package is: a section [project] would take its place."
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "project" not in told
    asked = {k: " ".join(v) if isinstance(v, list) else str(v) for k, v in told["tool"]["nbdev"].items()}
    defaults = {"nbs_path": "nbs", "doc_path": "_docs", "recursive": "True", "readme_nb": "index.ipynb", "clean_ids": "True", "put_version_in_init": "True",
                "jupyter_hooks": "False", "branch": "main", "doc_baseurl": "/", "doc_host": "", "git_url": ""}   # nbdev 3's own
    assert asked | defaults == {k: config[k] for k in asked | defaults}


def test_nobody_but_a_developer_is_bound_to_old_nbdev(config):
    "No requirement of the package holds nbdev or what it is made of back."
    family = {"nbdev", "fastcore", "execnb", "ghapi", "fastgit"}
    held = {Requirement(text).name for text in shlex.split(config["requirements"]) if "<" in text or "==" in text}
    assert not held & family and family <= {Requirement(text).name for text in shlex.split(config["dev_requirements"])}


def test_links_lead_to_a_file_here_or_to_somebody_else_s_page(config):
    "No address of this project is known: without `git_url` and `doc_host` nothing may link to one, and no part of an address may be left empty."
    assert config["git_url"] == config["doc_host"] == ""
    texts = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("*.md")}   # README.md is nbs/index.ipynb
    texts |= {path: "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
              for path in (ROOT / "nbs").rglob("*.ipynb") if path.name != config["readme_nb"]}
    links = [(path, link) for path, text in texts.items()
             for link in re.findall(r"\]\(([^()\s]*)\)", re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S))]   # [i](x) in code is none
    assert len(links) > 50
    for path, link in links:
        if "://" in link: assert urlsplit(link).netloc and config["repo"] not in link, (path.name, link)
        else: assert not link.startswith("/") and (path.parent / unquote(link.partition("#")[0])).exists(), (path.name, link)


def test_one_version_everywhere(config):
    version = config["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version
    init = (ROOT / config["lib_path"] / "__init__.py").read_text()
    assert f'__version__ = "{version}"' in init


def test_readme_matches_the_home_page():
    check = subprocess.run([sys.executable, ROOT / "docs" / "readme.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_readme_says_how_far_each_table_was_run():
    """`quick only`, or what `outputs/` holds beside it: the study's line names its data."""
    lines = {m[1]: m[2] for m in re.finditer(r"^\|.*\[`(\w+)`\]\(nbs/\1\.ipynb\).* \| ([^|]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)}
    assert set(lines) == set(TABLES) - {"frontier"}
    for name, told in lines.items():
        presets = {path.parent.name for path in (ROOT / "outputs" / name).glob("*/table.csv")}
        assert (told == "quick only") is (presets == {"quick"}) and (ROOT / "outputs" / f"{name}.ipynb").is_file(), name
        assert told == "quick only" or told.startswith(("reduced: ", "paper scale on ")), name


def test_readme_check_notices_a_difference(tmp_path):
    for name in ("docs/readme.py", "nbs/index.ipynb"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    run = lambda *args: subprocess.run([sys.executable, tmp_path / "docs/readme.py", *args], capture_output=True, text=True)
    assert run("--check").returncode == 1  # no README.md at all
    assert run().returncode == 0 and run("--check").returncode == 0
    with (tmp_path / "README.md").open("a") as readme:
        readme.write("one line more\n")
    stale = run("--check")
    assert stale.returncode == 1
    assert stale.stderr.strip() == "README.md differs from nbs/index.ipynb: run `python docs/readme.py`."


def test_wheel_holds_the_printed_numbers(config, tmp_path):
    source = tmp_path / "source"  # a copy: building in the checkout would leave files there, and find old ones
    shutil.copytree(ROOT / "adaptive_at", source / "adaptive_at", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
                           cwd=tmp_path, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))

    printed = sorted((ROOT / "adaptive_at" / "papers").glob("*.csv"))
    assert len(printed) == 22
    for csv in printed:
        assert wheel.read(f"adaptive_at/papers/{csv.name}") == csv.read_bytes(), csv.name

    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "adaptive_at").rglob("*.py")}
    assert modules == {name for name in wheel.namelist() if name.endswith(".py")}
    info = f"adaptive_at-{config['version']}.dist-info"
    if not (config["doc_host"] and config["git_url"]):  # nbdev would make links of it, such as /blob/main/adaptive_at/attacks.py
        assert f"{info}/entry_points.txt" not in wheel.namelist()
    metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Requires-Python"] == f">={config['min_python']}"
    assert set(metadata.get_all("Provides-Extra")) == {"dev", "corruptions", "bench", "cluster"}


def test_a_library_notebook_is_titled_with_its_module_once():
    paths = sorted((ROOT / "nbs" / "lib").glob("[0-9]*.ipynb"))
    assert len(paths) == len(list((ROOT / "nbs" / "lib").iterdir())) >= 42
    for path in paths:
        head = nbformat.read(path, 4).cells[0].source
        assert re.findall("^# (.+)", head, re.M) == [path.stem.partition("_")[2]] and len(re.findall("^> .+", head, re.M)) == 1, path.name


def test_table_notebooks_are_ready_for_papermill():
    notebooks = sorted((ROOT / "nbs").glob("table*.ipynb"))
    assert len(notebooks) == 22
    for path in notebooks:
        nb = json.loads(path.read_text())
        kernel = nb["metadata"].get("kernelspec", {})
        assert (kernel.get("name"), kernel.get("language")) == ("python3", "python"), path.name
        tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1, path.name


@pytest.mark.parametrize("text, found", [
    ('"/' + 'work/main"', True), ("see /" + "root/x", True), ("file:///" + "home/me", True), ("/" + "Users/me", True),
    ("net/" + "work/x", False), ("framework/root", False), ("https://example.org/" + "home/page", False),
    ("$HOME/" + "work/x", False), ("{tmp}/" + "work/x", False),
])
def test_absolute_paths_are_recognised(text, found):
    assert bool(ABSOLUTE.search(text.replace("file://", ""))) is found


def test_no_absolute_machine_paths():
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        hit = ABSOLUTE.search(text.replace("file://", ""))
        assert not hit, f"{path.relative_to(ROOT)}: {text[max(0, hit.start() - 40):hit.end() + 40]!r}"


# AutoAttack, which a third party repackaged

COMPARED = {   # SHA-256 of the attack files of pyautoattack 0.2.0, which differ from fra31/auto-attack at a392200 in imports and white space alone
    "autopgd_base.py": "6913041e2d8e94b72e659c9ea5452eb7d3476f24f32d227cdaae025c6db3c256",
    "fab_base.py": "63654f228a57b5ff56babd6ed3d1ddd0724827e8a210a48ba0d76cbc35333a5b",
    "fab_projections.py": "d2e095000c0ecd85f0eb22605465636487259c57147b4b2bd091c6ea86fb5bde",
    "fab_pt.py": "2ad605c1a161fbdc0109f4018760ffb2a10a63de6e218063bb33621e00013d1e",
    "square.py": "bd5c61d3b43d3b55b74b059477b74061a399a0f5f384cb51af91216682e247ae",
    "other_utils.py": "a06a038ab1ca59a2d8f09642b9a4e7f6e9b249cd8e6c6a9cbd308f47649268df"}


def unseen(folder):
    "The attack files in a folder that nobody compared with the authors' own."
    found = {name: hashlib.sha256((folder/name).read_bytes()).hexdigest() if (folder/name).is_file() else "" for name in COMPARED}
    return [name for name in COMPARED if found[name] != COMPARED[name]]


def test_autoattack_s_files_are_those_that_were_compared():
    installed = Path(str(metadata.distribution("pyautoattack").locate_file("pyautoattack")))
    assert not (new := unseen(installed)), (
        f"{', '.join(new)} of pyautoattack {metadata.version('pyautoattack')} differ from those of 0.2.0: compare them with fra31/auto-attack at a392200 (or a later commit), "
        "and then record their hashes here, and the commit in settings.ini and nbs/index.ipynb")


def test_a_release_that_changes_an_attack_is_noticed(tmp_path):
    installed = Path(str(metadata.distribution("pyautoattack").locate_file("pyautoattack")))
    for name in COMPARED: (tmp_path/name).write_bytes((installed/name).read_bytes())
    (tmp_path/"square.py").write_text((tmp_path/"square.py").read_text() + "\n")
    (tmp_path/"fab_pt.py").unlink()
    assert unseen(tmp_path) == ["fab_pt.py", "square.py"]


def test_readme_and_settings_say_whose_autoattack_is():
    for path in (ROOT/"README.md", ROOT/"settings.ini"):
        text = path.read_text(encoding="utf-8")
        assert all(part in text for part in ("pyautoattack", "third party", "fra31/auto-attack", "a392200", "imports", "white space alone", "wrapper")), path.name


def test_nbdev_update_changes_nothing(tmp_path):
    "An exported module goes back into its notebook as it came: in a sub-package, an import in a form that nbdev reads wrong would be rewritten."
    for path in project_files():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    before = {p: p.read_bytes() for folder in ("nbs", "adaptive_at") for p in (tmp_path / folder).rglob("*.*") if p.suffix in (".py", ".ipynb")}
    assert len(before) > 140
    subprocess.run([sys.executable, "-c", "from nbdev.sync import nbdev_update; nbdev_update()"], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert [str(p.relative_to(tmp_path)) for p, content in before.items() if p.read_bytes() != content] == []


def test_every_module_comes_from_one_notebook_and_none_is_left_over():
    exported = Counter(m[1] for path in project_files() if path.suffix == ".ipynb" and path.parent.name != "outputs" and path.is_relative_to(ROOT / "nbs")
                       for cell in nbformat.read(path, 4).cells if (m := re.match(r"#\| default_exp (\S+)", cell.source)))
    modules = {".".join(path.relative_to(ROOT / "adaptive_at").with_suffix("").parts) for path in (ROOT / "adaptive_at").rglob("*.py")}
    modules = {name for name in modules if name.rpartition(".")[2] not in ("__init__", "_modidx")}
    assert set(exported.values()) == {1} and modules == exported.keys() and len(modules) > 65


def test_the_names_of_notebooks_are_unique():
    "The site's pages drop the folder and the number."
    stems = [path.stem for path in (ROOT / "nbs").rglob("*.ipynb")]
    assert len(stems) == len(set(stems)) > 75
