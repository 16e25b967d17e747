"""Speaks to a gateway's admin API, for the command line."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any

from steersman.runtime import archive
from steersman.runtime.errors import UserError

TIMEOUT_S = 60.0  # a bundle is loaded and tested before the answer


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the named server only."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


class AdminClient:
    """One gateway's admin API. Every method raises UserError with the gateway's sentence, or why there is none."""

    def __init__(self, url: str, key: str | None, timeout_s: float = TIMEOUT_S) -> None:
        """key: the admin key, if the gateway has one.

        Raises:
            UserError: the URL is none of HTTP, or the key none that a header can hold.
        """
        key = (key or "").strip()  # of a secret's file, with the end of its line
        if not (key.isascii() and key.isprintable()):  # urllib would show it
            raise UserError("STEERSMAN_ADMIN_KEY holds no admin key: it has odd characters")
        if urllib.parse.urlsplit(url).scheme not in ("http", "https") or not urllib.parse.urlsplit(url).hostname:
            raise UserError(f"--admin {url!r}: expected a URL such as http://127.0.0.1:8081")
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout_s = timeout_s
        # No proxy from the environment: the key is not for it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    def state(self) -> dict[str, Any]:
        return self._ask("GET", "/admin/state")

    def policies(self) -> list[dict[str, Any]]:
        return list(self._ask("GET", "/admin/policies")["policies"])

    def push(self, policy: str, place: str, share: float | None) -> str:
        """Deploy what `policy` names: a run folder, a bundle, a version that was pushed before, or a heuristic.

        share: a canary's; None for the gateway's default. Returns what was done.
        """
        query = {"as": place, **({} if share is None else {"share": f"{share:g}"})}
        path = Path(policy)
        if path.exists() or "/" in policy or policy.endswith(".zip"):
            data, kind = archive.pack(archive.read(archive.locate(path))), "application/zip"
            return self._done("POST", "/admin/policies", query, data, kind)
        if any(listed["version"] == policy for listed in self.policies()):
            return self._done("POST", f"/admin/policies/{urllib.parse.quote(policy, safe='')}/activate", query)
        body = json.dumps({"heuristic": policy}).encode()
        return self._done("POST", "/admin/policies", query, body, "application/json")

    def rollback(self) -> str:
        return self._done("POST", "/admin/policies/rollback")

    def promote(self) -> str:
        return self._done("POST", "/admin/policies/promote")

    def stop(self, place: str) -> str:
        return self._done("DELETE", f"/admin/policies/{place}")

    def drain(self, replica: str) -> str:
        return self._done("POST", f"/admin/replicas/{urllib.parse.quote(replica, safe='')}/drain")

    def resume(self, replica: str) -> str:
        return self._done("POST", f"/admin/replicas/{urllib.parse.quote(replica, safe='')}/resume")

    def _done(
        self, method: str, path: str, query: dict[str, str] | None = None, body: bytes = b"", kind: str = ""
    ) -> str:
        return str(self._ask(method, path, query, body, kind)["sentence"])

    def _ask(
        self, method: str, path: str, query: dict[str, str] | None = None, body: bytes = b"", kind: str = ""
    ) -> dict[str, Any]:
        url = self._url + path + (f"?{urllib.parse.urlencode(query)}" if query else "")
        headers = self._headers | ({"Content-Type": kind} if kind else {})
        request = urllib.request.Request(url, data=body if method == "POST" else None, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                return self._json(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                said = self._json(error.read()).get("error", f"status {error.code}")
            if error.code == 401:
                said = f"{self._url}: the admin key is missing or wrong; set STEERSMAN_ADMIN_KEY"
            raise UserError(str(said)) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise UserError(
                    f"{self._url}: its certificate is not trusted here ({reason.verify_message}); "
                    "name a file with that of its issuer in SSL_CERT_FILE"
                ) from None
            said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise UserError(
                f"{self._url}: no gateway answers there ({said}); name its admin port with --admin or STEERSMAN_ADMIN"
            ) from None

    def _json(self, text: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UserError(f"{self._url}: answers, but not as an admin API does; name the admin port with --admin")
        return answer
