"""A harvest on the Hub: a dataset card for its folder, and one commit that holds all of it.

In: a folder that `sae-factory harvest` completed, and its manifest. Out: a dataset repository that
`SavedActivations("hf://user/name")` streams. Only files that the manifest lists go up. The files themselves are sent
before the commit is made, so an interrupted push leaves the repository as it was, and the next one sends the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dictionary_learning.activations.shards import MANIFEST, TOKENS, manifest_files
from dictionary_learning.errors import UserError
from dictionary_learning.hub_client import hub_endpoint, open_repository, reach_hub, said_plainly

NAMED_CORPORA = 20  # that a card names
_OURS = re.compile(rf"({TOKENS}/)?shard-\d+\.safetensors")


def check_licence(licence: str | None) -> None:
    """Raises UserError unless a licence is an identifier as the Hub has them."""
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise UserError(f"--licence '{licence}' is not an identifier such as mit, apache-2.0 or cc-by-4.0.")


def card(manifest: Mapping[str, Any], licence: str | None = None, repo: str | None = None) -> str:
    """README.md of a harvest. `licence` is that of the texts; None looks up the medical corpora."""
    import yaml

    model, corpus, settings = manifest["model"], manifest["corpus"], manifest["settings"]
    name = _plain(model["name"])
    found = licence or _known_licence(corpus, manifest["corpora"])
    head = {
        "license": found or "unknown",
        "tags": ["activations", "sparse-autoencoders", "interpretability", "sae-factory"],
        "viewer": False,
    }
    points = [
        f"| `{_plain(name)}` | {point['width']} | {'–' if point['layer'] is None else point['layer']} |"
        for name, point in manifest["hook_points"].items()
    ]
    corpora = ", ".join(map(_plain, manifest["corpora"][:NAMED_CORPORA]))
    if len(manifest["corpora"]) > NAMED_CORPORA:
        corpora += f" and {len(manifest['corpora']) - NAMED_CORPORA} more"
    said = f"`{found}`{'' if licence else ' (as its sources state)'}" if found else "unknown: ask its publisher"
    kept = "without special tokens" if settings["remove_bos"] else "with special tokens"
    multiple = settings["max_activation_norm_multiple"]
    if multiple is not None:
        kept += f", without rows above {multiple:g} times the median norm"
    sizes = f"{manifest['rows']:,} rows of {manifest['documents']:,} documents in {len(manifest['shards']):,} shards"
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# Activations of {name}

| hook point | width | layer |
|---|---|---|
{chr(10).join(points)}

- Model: `{name}`, {_plain(model["architecture"])}, {model["parameters"]:,} parameters, run in {model["dtype"]}.
- Rows: {sizes}; {kept}.
- Contexts: {settings["ctx_len"]} tokens, packed, each beginning with BOS where the tokenizer has one.
- Corpus: `{_plain(corpus["name"])}` ({_plain(corpus["split"])} part): {corpora}.
- Licence of the texts: {said}. The token ids in `{TOKENS}/` spell them out.

`{MANIFEST}` lists rows and SHA-256 of every shard. `{TOKENS}/` has document, position, token, corpus and context of
each row.

```python
from dictionary_learning.activations import SavedActivations

for batch in SavedActivations("{f"hf://{repo}" if repo else "path/of/this/folder"}"):
    batch.acts, batch.provenance
```

Made with SAE Factory (`sae-factory harvest`).
"""


def _plain(text: object) -> str:
    """Text of unknown origin for a line of Markdown: short, no markup."""
    kept = re.sub(r"[^\w .,:;/()+-]", "", " ".join(str(text).split()))
    return kept[:80] or "–"


def _known_licence(corpus: Mapping[str, Any], corpora: list[str]) -> str | None:
    """The licence of the six medical corpora on the Hub, or of the samples that come with this project; else None."""
    from data_prep.sources import CORPORA

    if corpus["name"] == "embedded":
        return "mit"
    if not str(corpus["fingerprint"]).startswith("hub:") or not corpora or not set(corpora) <= set(CORPORA):
        return None
    licences = {CORPORA[name].licence for name in corpora}
    return licences.pop() if len(licences) == 1 else "other"


def push_harvest(folder: Path, manifest: Mapping[str, Any], repo: str, *, private: bool = False) -> str:
    """Upload a complete harvest as a dataset repository in one commit; its address.

    The repository is made if it does not exist. Shards of an earlier harvest go in the same commit.

    Raises:
        UserError: the Hub refuses or can't be reached; or `private` is asked of a repository that is public.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=hub_endpoint())
    files = [*manifest_files(manifest), MANIFEST, "README.md"]
    what = f"Could not push to '{repo}' (the files in '{folder}' are whole: the same command pushes them again)"
    with said_plainly(what):
        reach_hub()
        url = open_repository(api, repo, repo_type="dataset", private=private)
        info = api.dataset_info(url.repo_id)
        there = {sibling.rfilename for sibling in info.siblings or ()}
        stale = sorted(name for name in there - set(files) if _OURS.fullmatch(name))
        api.create_commit(
            url.repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in files),
                *(CommitOperationDelete(name) for name in stale),
            ],
            repo_type="dataset",
            parent_commit=info.sha,
            commit_message=f"Add activations of {_plain(manifest['model']['name'])} (SAE Factory harvest)",
        )
    return str(url)
