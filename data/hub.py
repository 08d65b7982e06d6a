"""Datasets of the Hugging Face Hub: which files there are, and one of them on this disk."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.parts import FULL, READ, Part, Source, listed
from data.splits import Chosen, choose, doubtful, is_named, of_one_kind, readable, reasons

OPENWEBTEXT = "Skylion007/openwebtext"
OPENWEBTEXT_DOCUMENTS = 8_013_769
HUB_ATTEMPTS = 6  # of a download, with pauses of 1, 2, 4 ... seconds
CONVERTED = "refs/convert/parquet"  # the branch that the Hub makes by itself


def hub_source(
    name: str, subset: str, split: str, revision: str, val_split: str = ""
) -> Source | Path:
    """The files of a Hub dataset's split; the revision is pinned to the commit that it names now.

    Where the Hub does not answer: the folder of the copy in the Hub's cache, if it is whole.
    Raises OSError when there is neither, ValueError when it has no such files.
    """
    from huggingface_hub import HfApi

    repo = name.removeprefix("hub:")
    if not repo:
        raise ValueError("source=hub: names no dataset; write --source=hub:USER/NAME")
    problem = None
    for at in [revision] if revision else ["", CONVERTED]:
        try:
            info = HfApi().dataset_info(repo, revision=at or None, files_metadata=True, timeout=20)
        except Exception as e:  # OSError, httpx's and huggingface_hub's own
            problem = problem or e
            continue
        sizes = {f.rfilename: f.size or 0 for f in info.siblings or []}
        files, left = readable(sorted(sizes))
        if not files:
            continue
        if at == CONVERTED:  # its folders are the subsets
            files = of_subset(files, subset)
        configs = info.card_data.get("configs") if info.card_data else None
        chosen = choose(files, split, val_split, subset, configs)
        if any(f"partial-{split}/" in f for f in chosen.train):
            print(
                f"WARNING: the Hub has converted only a part of {repo}; you get no more than that"
            )
        return source_of(name, repo, str(info.sha), chosen, sizes, left)
    if problem is not None:
        if (cached := in_cache(repo, revision)) is not None:
            return cached
        raise OSError(
            f"cannot get {repo} from the Hub ({type(problem).__name__}); set HF_ENDPOINT to a "
            f"mirror, or download it elsewhere (hf download {repo} --repo-type=dataset "
            "--local-dir=FOLDER) and give --source=FOLDER; --source=stdlib needs no network"
        ) from problem
    raise ValueError(f"{repo} on the Hub has no files that are read here: {READ}")


def of_subset(files: list[str], subset: str) -> list[str]:
    """The files in the folder of a subset. Raises ValueError when one has to be chosen."""
    folders = sorted({f.split("/")[0] for f in files})
    if not subset and len(folders) > 1:
        subset = "default" if "default" in folders else ""
    if not subset and len(folders) > 1:
        raise ValueError(f"several subsets ({', '.join(folders[:20])}): choose one, --subset=...")
    return [f for f in files if not subset or f.startswith(f"{subset}/")]


def source_of(
    name: str,
    repo: str,
    sha: str,
    chosen: Chosen,
    sizes: dict[str, int],
    left: dict[str, list[str]],
) -> Source:
    """A source of the files that were chosen; left: those that hold no text."""
    chosen = of_one_kind(chosen)
    parts = [
        Part((f,), i, sizes[f], repo=repo, revision=sha, val=i >= len(chosen.train))
        for i, f in enumerate([*chosen.train, *chosen.val])
    ]
    parts = [replace(part, named=is_named(part.files[0], chosen)) for part in parts]
    left = left | reasons(chosen)
    said = [f"{repo} at {sha[:7]}: {len(chosen.train)} files for training"]
    said += doubtful(chosen)
    if left:
        said.append(f"left out: {listed(left)}")
    documents = OPENWEBTEXT_DOCUMENTS if repo.lower() == OPENWEBTEXT.lower() else None
    return Source(name, parts, len(chosen.train), sha, documents, said, left)


def in_cache(repo: str, revision: str) -> Path | None:
    """The folder of a dataset in the Hub's cache; None where it is not, or not whole."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repo, repo_type="dataset", revision=revision or None, local_files_only=True
        )
    except Exception:  # huggingface_hub's own, for what is not there
        return None
    folder = Path(found)
    unfinished = list(folder.parent.parent.glob("blobs/*.incomplete"))
    if unfinished:
        print(f"{folder} is not whole: hf download {repo} --repo-type=dataset goes on with it")
        return None
    return folder


def fetch(part: Part, folder: Path) -> tuple[Path, bool]:
    """A Hub file on this disk: its path, and whether it was downloaded into `folder` for us.

    A file in the Hub's cache is used where it lies. A cut download goes on where it stopped.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    (name,) = part.files
    cached = try_to_load_from_cache(part.repo, name, revision=part.revision, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached), False
    for attempt in range(HUB_ATTEMPTS):
        try:
            where: dict[str, Any] = {"repo_type": "dataset", "revision": part.revision}
            return Path(hf_hub_download(part.repo, name, local_dir=folder, **where)), True
        except Exception as e:  # OSError, httpx's and huggingface_hub's own
            if getattr(e, "errno", None) in FULL:
                raise
            if attempt == HUB_ATTEMPTS - 1:
                raise OSError(
                    f"cannot download {name} of {part.repo} ({type(e).__name__}); run the same "
                    "command again to go on from here, or set HF_ENDPOINT to a mirror"
                ) from e
            time.sleep(2**attempt)
    raise AssertionError
