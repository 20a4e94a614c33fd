"""A small Weights & Biases server on loopback: the real client logs runs and moves artifacts.

It answers the client's GraphQL operations by name, takes and gives files at "signed" URLs on
itself, and collects the file stream of each run, all in memory.
"""
import base64
import gzip
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

ENTITY = "tester"
KEY = "0123456789abcdef0123456789abcdef01234567"  # forty characters, as the client demands


class WandbServer:
    """The server and what it was told.

    runs       {run id: {project, job_type, config, history (rows), summary, uses, exit}}
    artifacts  {id: {project, name, type, version, aliases, metadata, run, state, digest}}
    files      {key: bytes}, everything that was PUT under /storage/<key>
    operations [name of each GraphQL operation]; those without an answer are also in `unknown`
    """

    def __init__(self):
        self.refusing = False  # whether every key is refused
        self.runs, self.artifacts, self.files = {}, {}, {}
        self.operations, self.unknown = [], []
        self.lock = threading.Lock()

        handler = type("BoundHandler", (Handler,), {"server_state": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Close the port: from now on connections are refused. May be called twice."""
        self.http.shutdown()
        self.http.server_close()

    def publish(self, name, type, contents, project="davis"):
        """Add a version of artifact `name` as if a client had: contents {entry path: bytes}."""
        created = self.do_CreateArtifact({"input": {
            "projectName": project, "artifactCollectionName": name, "artifactTypeName": type,
            "digest": "0", "aliases": [{"alias": "latest"}]}})
        artifact = self.artifacts[created["createArtifact"]["artifact"]["id"]]
        entries = {}
        for path, data in contents.items():
            digest = base64.b64encode(hashlib.md5(data).digest()).decode()
            entries[path] = {"digest": digest, "birthArtifactID": artifact["id"], "size": len(data)}
            self.files[f"blob/{artifact['id']}/{path}"] = data
        manifest = {"version": 1, "storagePolicy": "wandb-storage-policy-v1",
                    "storagePolicyConfig": {"storageLayout": "V2"}, "contents": entries}
        self.files[f"manifest/{artifact['id']}"] = json.dumps(manifest).encode()
        self.do_CommitArtifact({"artifactID": artifact["id"]})
        return artifact

    def artifact(self, name):
        """Return the committed artifact called "collection:alias" or "collection:vN", or None."""
        collection, alias = name.split(":")
        found = [artifact for artifact in self.artifacts.values()
                 if (artifact["name"], artifact["state"]) == (collection, "COMMITTED")
                 and alias in (*artifact["aliases"], artifact["version"])]
        return found[0] if found else None

    def entries(self, artifact):
        """Return {entry path: its manifest record, with the key of its bytes in `files`}."""
        contents = json.loads(self.files[f"manifest/{artifact['id']}"])["contents"]
        return {path: {**entry, "key": f"blob/{entry['birthArtifactID']}/{path}"}
                for path, entry in contents.items()}

    def contents(self, artifact):
        """Return {entry path: bytes} of an artifact."""
        return {path: self.files[entry["key"]] for path, entry in self.entries(artifact).items()}

    def signed(self, key):
        """Return the URL where `key` is put and got."""
        return f"{self.url}/storage/{quote(key)}"

    def answer(self, operation, variables, query):
        """Return the `data` of one operation; to an unknown one, what an empty server would."""
        with self.lock:
            self.operations.append(operation)
            method = getattr(self, f"do_{operation}", None)
            if method is None:
                self.unknown.append(f"{operation}: {query}")
                return {}
            return method(variables)

    def do_Viewer(self, _):
        return {"viewer": {"id": "user", "entity": ENTITY, "username": ENTITY,
                           "email": "tester@localhost", "flags": "{}", "teams": {"edges": []}}}

    do_GetDefaultEntity = do_Viewer

    def do_ServerFeaturesQuery(self, _):
        return {"serverInfo": {"features": []}}

    def do_UpsertBucket(self, v):
        project, name = v.get("project") or "uncategorized", v.get("name") or v["id"]
        run = self.runs.setdefault(name, {"project": project, "config": {}, "history": [],
                                          "summary": {}, "uses": [], "exit": None})
        for key, item in json.loads(v.get("config") or "{}").items():
            run["config"][key] = item["value"]
        run["job_type"] = v.get("jobType") or run.get("job_type")
        owner = {"id": project, "name": run["project"], "entity": {"id": ENTITY, "name": ENTITY}}
        return {"upsertBucket": {"inserted": True, "bucket": {
            "id": name, "name": name, "displayName": name, "project": owner}}}

    def do_CreateRunFiles(self, v):
        files = [{"name": name, "uploadUrl": self.signed(f"run/{v['run']}/{name}")}
                 for name in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    def do_CreateArtifact(self, v):
        spec = v["input"]
        project, name = spec["projectName"], spec["artifactCollectionName"]
        aliases = [alias["alias"] for alias in spec.get("aliases") or []]
        others = [other for other in self.artifacts.values()
                  if (other["project"], other["name"]) == (project, name)]
        for other in others:  # the same files again make no new version; its aliases move
            same = (other["digest"], other["state"]) == (spec["digest"], "COMMITTED")
            if same and spec.get("enableDigestDeduplication"):
                other["aliases"] = list({*other["aliases"], *aliases})
                self.do_CommitArtifact({"artifactID": other["id"]})
                artifact = {key: other[key] for key in ("id", "state")}
                return {"createArtifact": {"artifact": artifact}}
        artifact = {"id": f"artifact{len(self.artifacts)}", "project": project, "name": name,
                    "type": spec["artifactTypeName"], "version": f"v{len(others)}",
                    "aliases": aliases, "metadata": json.loads(spec.get("metadata") or "{}"),
                    "run": spec.get("runName"), "digest": spec["digest"], "state": "PENDING"}
        self.artifacts[artifact["id"]] = artifact
        return {"createArtifact": {"artifact": {"id": artifact["id"], "state": "PENDING"}}}

    def do_CreateArtifactManifest(self, v):
        key = f"manifest/{v['artifactID']}"
        file = {"id": key, "uploadUrl": self.signed(key), "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": key, "file": file}}}

    def do_CreateArtifactFiles(self, v):
        edges = []
        for spec in v["input"]["artifactFiles"]:
            key = f"blob/{spec['artifactID']}/{spec['name']}"
            edges.append({"node": {"storagePath": key, "uploadUrl": self.signed(key),
                                   "uploadHeaders": [], "artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def do_CommitArtifact(self, v):
        artifact = self.artifacts[v["artifactID"]]
        for other in self.artifacts.values():  # an alias goes to the newest that asked for it
            same = (other["project"], other["name"]) == (artifact["project"], artifact["name"])
            if same and other is not artifact:
                other["aliases"] = list({*other["aliases"]} - {*artifact["aliases"]})
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {key: artifact[key] for key in ("id", "digest")}}}

    def do_UseArtifact(self, v):
        spec = v.get("input") or v
        self.runs[spec["runName"]]["uses"].append(spec["artifactID"])
        return {"useArtifact": {"artifact": {"id": spec["artifactID"]}}}

    def do_OrganizationCoreWeaveOrganizationID(self, _):
        return {"entity": {"organization": None}}

    def do_ArtifactByID(self, v):
        return {"artifact": self.describe(self.artifacts[v["id"]])}

    def do_ArtifactMembershipByName(self, v):
        artifact = self.artifact(v["name"])
        if v["entity"] != ENTITY or artifact is None or artifact["project"] != v["project"]:
            return {"project": {"artifactCollectionMembership": None}}
        described = self.describe(artifact)
        shared = {key: described[key] for key in ("versionIndex", "createdAt", "aliases")}
        return {"project": {"artifactCollectionMembership": {
            "__typename": "ArtifactCollectionMembership", "id": f"member-{artifact['id']}",
            "artifactCollection": described["artifactSequence"], "artifact": described, **shared}}}

    def describe(self, artifact):
        """Return an artifact as GraphQL describes one."""
        owner = artifact["project"]
        project = {"id": owner, "internalId": owner, "name": owner, "entity": {"name": ENTITY}}
        collection = {"__typename": "ArtifactSequence", "name": artifact["name"],
                      "project": project}
        aliases = [{"__typename": "ArtifactAlias", "id": alias, "alias": alias,
                    "artifactCollection": collection} for alias in artifact["aliases"]]
        sizes = [entry["size"] for entry in self.entries(artifact).values()]
        return {"__typename": "Artifact", "id": artifact["id"], "artifactSequence": collection,
                "versionIndex": int(artifact["version"][1:]), "aliases": aliases,
                "artifactType": {"name": artifact["type"]}, "description": None,
                "metadata": json.dumps(artifact["metadata"]), "ttlDurationSeconds": -2,
                "ttlIsInherited": True, "tags": [], "historyStep": None, "size": sum(sizes),
                "state": artifact["state"], "digest": artifact["digest"], "commitHash": "0",
                "fileCount": len(sizes), "createdAt": "2026-01-01", "updatedAt": "2026-01-01"}

    def do_ArtifactType(self, v):
        artifact = self.artifact(v["name"])
        node = artifact and {"artifactType": {"name": artifact["type"]}}
        return {"project": {"artifact": node}}

    def do_FetchArtifactManifest(self, v):
        file = {"directUrl": self.signed(f"manifest/{v['id']}")}
        return {"artifact": {"currentManifest": {"file": file}}}

    def do_GetArtifactMembershipFileUrls(self, v):
        artifact = self.artifact(f"{v['collection']}:{v['alias']}")
        edges = [{"node": {"__typename": "File", "name": path,
                           "directUrl": self.signed(entry["key"])}}
                 for path, entry in self.entries(artifact).items()]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"project": {"artifactCollection": {
            "__typename": "ArtifactSequence",
            "artifactMembership": {"files": {"pageInfo": page, "edges": edges}}}}}

    def file_stream(self, run_id, body):
        """Take a file-stream message: history rows, the summary, at the end the exit code."""
        run = self.runs[run_id]
        for name, chunk in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run["history"] += [json.loads(line) for line in chunk["content"]]
            elif name == "wandb-summary.json":
                run["summary"] = json.loads(chunk["content"][-1])
        if body.get("complete"):
            run["exit"] = body.get("exitcode")
        return {}


class Handler(BaseHTTPRequestHandler):
    """The HTTP side: GraphQL and file streams by POST, stored files by PUT and GET."""

    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds; an idle connection does not keep its thread

    def do_POST(self):
        state, body = self.server_state, self.body()
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if stream:
            with state.lock:
                answer = state.file_stream(stream.group(1), json.loads(body))
            return self.reply(json.dumps(answer).encode())
        message = json.loads(body)
        if state.refusing:
            return self.reply(b'{"errors": [{"message": "who are you?"}]}', 401)
        named = re.search(r"(?:query|mutation)\s+(\w+)", message["query"])
        operation = message.get("operationName") or named.group(1)
        data = state.answer(operation, message.get("variables") or {}, message["query"])
        self.reply(json.dumps({"data": data}).encode())

    def do_PUT(self):
        self.server_state.files[unquote(self.path.removeprefix("/storage/"))] = self.body()
        self.reply(b"")

    def do_GET(self):
        found = self.server_state.files.get(unquote(self.path.removeprefix("/storage/")))
        self.reply(found or b"", 200 if found is not None else 404)

    def body(self):
        """Return the request's body, unpacked."""
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def reply(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing: a test's output is its own."""
