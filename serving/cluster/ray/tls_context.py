"""How either end of a session's calls uses its certificate: TLS 1.3, and both show who they are."""

from __future__ import annotations

import ssl
import tempfile

from serving.cluster.ray.messages import Tls

DRIVER = "driver.hocket.internal"  # what the certificate of the API process is for
INSTANCE = "instance.hocket.internal"


def driver_context(tls: Tls) -> ssl.SSLContext:
    """Return what the API process listens with: who has no certificate is refused."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, tls)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def instance_context(tls: Tls) -> ssl.SSLContext:
    """Return what an instance calls with, for the server name `DRIVER`."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, tls)  # this one asks for certificate and name


def _context(protocol: int, tls: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=tls.authority)
    # The library takes keys from files only: one that nobody else can read, for this moment.
    with tempfile.NamedTemporaryFile("w", prefix="hocket-") as file:
        file.write(tls.certificate + tls.key)
        file.flush()
        context.load_cert_chain(file.name)
    return context
