"""What a Kubernetes API server would say of a manifest, by the schemas in KubeRay's custom resource definitions."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[3] / "shared/kuberay"
Schema = dict[str, Any]
_INT32 = {"minimum": -(2**31), "maximum": 2**31 - 1}


@functools.cache
def definition(kind: str) -> Schema:
    """The schema of a kind's stored version, strict. Skips the test where the definitions are not at hand."""
    file = FOLDER / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"KubeRay's custom resource definitions are not in {FOLDER}")
    custom = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
    (stored,) = [version for version in custom["versions"] if version["storage"]]
    schema = strict(stored["schema"]["openAPIV3Schema"])
    schema["properties"]["apiVersion"] = {"const": f"{custom['group']}/{stored['name']}"}
    schema["properties"]["kind"] = {"const": custom["names"]["kind"]}
    template = _pod_template(schema if kind == "RayCluster" else definition("RayCluster"))
    schema["properties"]["metadata"] = template["properties"]["metadata"]
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return schema


def strict(schema: Schema) -> Schema:
    """A structural schema as JSON Schema that is as strict as `kubectl apply --validate=strict`: an unknown field is an
    error, unless the schema keeps unknown fields."""
    kept = ("enum", "pattern", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength", "required")
    converted: Schema = {key: schema[key] for key in kept if key in schema}
    for combined in ("anyOf", "oneOf", "allOf"):
        if combined in schema:
            converted[combined] = [strict(part) for part in schema[combined]]
    if schema.get("x-kubernetes-int-or-string"):
        converted["type"] = ["integer", "string"]
        return converted
    if "type" in schema:
        converted["type"] = [schema["type"], "null"] if schema.get("nullable") else schema["type"]
    if schema.get("format") == "int32":
        converted = _INT32 | converted
    if "items" in schema:
        converted["items"] = strict(schema["items"])
        keys = schema.get("x-kubernetes-list-map-keys")
        if keys:
            converted["uniqueBy"] = {key: schema["items"]["properties"][key].get("default") for key in keys}
    if "properties" in schema:
        converted["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), dict):
        converted["additionalProperties"] = strict(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        converted["additionalProperties"] = schema.get("additionalProperties", False)
    return converted


def problems(manifest: Schema, schema: Schema) -> list[str]:
    """What is wrong with a manifest: the path of a field, and why."""
    errors = _Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def pod_template() -> Schema:
    return _pod_template(definition("RayCluster"))


def schema_of(kind: str) -> Schema:
    """The strict schema of a manifest's kind. Those of Kubernetes itself are put together from what KubeRay's
    definitions embed of them; Namespace, ServiceAccount and ConfigMap have few fields."""
    if kind in ("RayCluster", "RayJob"):
        return definition(kind)
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    if kind == "NetworkPolicy":
        rules = definition("RayCluster")["properties"]["spec"]["properties"]["networkPolicy"]["properties"]["head"]
        peer = rules["properties"]["ingressRules"]["items"]["properties"]["from"]["items"]
        spec = {
            "podSelector": peer["properties"]["podSelector"],
            "policyTypes": {"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
            "ingress": rules["properties"]["ingressRules"],
            "egress": rules["properties"]["egressRules"],
        }
        return _kubernetes("networking.k8s.io/v1", kind, spec={"properties": spec, "required": ["podSelector"]})
    if kind == "PersistentVolumeClaim":
        volume = pod_template()["properties"]["spec"]["properties"]["volumes"]["items"]["properties"]
        claim = volume["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
        return _kubernetes("v1", kind, spec=claim)
    if kind == "ConfigMap":
        return _kubernetes("v1", kind, data=texts, binaryData=texts, immutable={"type": "boolean"})
    if kind == "ServiceAccount":
        return _kubernetes("v1", kind, automountServiceAccountToken={"type": "boolean"})
    if kind == "Namespace":
        return _kubernetes("v1", kind)
    raise ValueError(f"no schema is known for {kind}")


def _kubernetes(version: str, kind: str, **fields: Schema) -> Schema:
    fields = {name: {"type": "object", "additionalProperties": False, **field} if "type" not in field else field
              for name, field in fields.items()}  # fmt: skip
    metadata = pod_template()["properties"]["metadata"]
    properties = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata, **fields}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": ["apiVersion", "kind", "metadata"],
    }


def _pod_template(cluster: Schema) -> Schema:
    return cluster["properties"]["spec"]["properties"]["workerGroupSpecs"]["items"]["properties"]["template"]


def _unique_by(validator: Any, keys: Schema, items: Any, schema: Schema) -> Iterator[jsonschema.ValidationError]:
    seen = [tuple(item.get(key, default) for key, default in keys.items()) for item in items]
    for each in sorted({repr(key) for key in seen if seen.count(key) > 1}):
        yield jsonschema.ValidationError(f"{each} stands twice; entries differ in {', '.join(keys)}")


_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"uniqueBy": _unique_by})
