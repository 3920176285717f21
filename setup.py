"Package metadata: all of it stands in settings.ini."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    classifiers=[
        f"Development Status :: {cfg['status']}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["papers/*.csv"]},  # the numbers as the papers print them
    zip_safe=False,
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={
        "dev": shlex.split(cfg["dev_requirements"]),
        "corruptions": shlex.split(cfg["corruptions_requirements"]),
        "bench": shlex.split(cfg["bench_requirements"]),
        "cluster": shlex.split(cfg["cluster_requirements"]),
    },
    # Other projects' nbdev makes links of this index: to nowhere, as long as no address of ours is known.
    entry_points={"nbdev": [f"{cfg['lib_path']} = {cfg['lib_path']}._modidx:d"]} if cfg["doc_host"] and cfg["git_url"] else {},
)
