"""Kustomizations rendered without kustomize: the part of it that `cluster/` uses, so that its manifests are tested
where there is no kubectl. `render_with_kubectl` is the real thing; a test holds the two against each other.
"""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
_FIELDS = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
_FIELDS |= {"configMapGenerator", "generatorOptions"}
_CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "PersistentVolume", "StorageClass"}


def render(folder: Path) -> list[Manifest]:
    """The manifests of a folder with a `kustomization.yaml`, as `kubectl kustomize FOLDER` prints them, in any order.

    Raises ValueError for a field of a kustomization, or a kind of patch, that is not known here.
    """
    wanted = _read(folder / "kustomization.yaml")[0]
    if unknown := set(wanted) - _FIELDS:
        raise ValueError(f"{folder}: kustomizing.py does not know {sorted(unknown)}; known: {sorted(_FIELDS)}")
    found: list[Manifest] = []
    for entry in wanted.get("resources", []):
        place = folder / entry
        found += render(place) if place.is_dir() else _read(place)
    found += [_config_map(folder, entry, wanted) for entry in wanted.get("configMapGenerator", [])]
    for patch in wanted.get("patches", []):
        if set(patch["target"]) - {"kind", "name"}:
            raise ValueError(f"{folder}: kustomizing.py knows targets by kind and name, not {patch['target']}")
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
        hit = [each for each in found if each["kind"] == patch["target"]["kind"]
               and each["metadata"]["name"] == patch["target"].get("name", each["metadata"]["name"])]  # fmt: skip
        if not hit:
            raise ValueError(f"{folder}: no manifest is {patch['target']}")
        for each in hit:
            apply_patch(each, yaml.safe_load(text))
    for each in found:
        if "namespace" in wanted and each["kind"] not in _CLUSTER_WIDE:
            each["metadata"]["namespace"] = wanted["namespace"]
        for image in wanted.get("images", []):
            _set_image(each, image)
    return found


def render_with_kubectl(folder: Path) -> list[Manifest] | None:
    """What `kubectl kustomize` prints; None where there is no kubectl, or one older than 2022 (kustomize 4.5)."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return None
    about = subprocess.run([kubectl, "version", "--client", "-o", "json"], capture_output=True, text=True)
    version = re.search(r'"kustomizeVersion": "v(\d+)\.(\d+)', about.stdout)
    if version is None or (int(version[1]), int(version[2])) < (4, 5):
        return None
    rendered = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert rendered.returncode == 0, rendered.stderr
    assert "deprecated" not in rendered.stderr, rendered.stderr
    return list(yaml.safe_load_all(rendered.stdout))


def apply_patch(manifest: Manifest, operations: Any) -> None:
    """A JSON patch (RFC 6902), in place: add, replace and remove, each of which has to find its place."""
    if not isinstance(operations, list):
        raise ValueError("kustomizing.py knows JSON patches, a list of operations, alone")
    for operation in operations:
        *path, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        at: Any = manifest
        for part in path:
            at = at[int(part)] if isinstance(at, list) else at[part]
        key = int(last) if isinstance(at, list) and last != "-" else last
        if operation["op"] == "add" and isinstance(at, list):
            at.insert(len(at) if key == "-" else key, operation["value"])
        elif operation["op"] == "add":
            at[key] = operation["value"]
        elif operation["op"] == "replace":
            at[key]  # has to be there
            at[key] = operation["value"]
        elif operation["op"] == "remove":
            del at[key]
        else:
            raise ValueError(f"a JSON patch has add, replace and remove here, not {operation['op']!r}")


def _read(path: Path) -> list[Manifest]:
    # What anchors name is one object in Python; a patch to one of its places must not reach the others.
    return [json.loads(json.dumps(each)) for each in yaml.safe_load_all(path.read_text()) if each]


def _config_map(folder: Path, entry: Manifest, wanted: Manifest) -> Manifest:
    plain = wanted.get("generatorOptions", {}).get("disableNameSuffixHash")
    if not plain or set(entry) - {"name", "files", "literals"}:
        raise ValueError(f"{folder}: kustomizing.py knows ConfigMaps of files and literals without a suffix alone")
    data = {Path(name).name: (folder / name).read_text() for name in entry.get("files", [])}
    data |= dict(literal.split("=", 1) for literal in entry.get("literals", []))
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry["name"]}, "data": data}


def _set_image(node: Any, image: Manifest) -> None:
    """The image of every container, wherever containers stand."""
    if isinstance(node, list):
        for item in node:
            _set_image(item, image)
    elif isinstance(node, dict):
        for container in [*(node.get("containers") or []), *(node.get("initContainers") or [])]:
            if "image" in container and re.split(r"[:@]", container["image"])[0] == image["name"]:
                name, tag = image.get("newName", image["name"]), image.get("newTag")
                container["image"] = f"{name}:{tag}" if tag else name
        for value in node.values():
            _set_image(value, image)


def changed(manifest: Manifest, *operations: Manifest) -> Manifest:
    """A copy with a JSON patch applied."""
    copied = copy.deepcopy(manifest)
    apply_patch(copied, list(operations))
    return copied
