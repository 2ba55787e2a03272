"""Certificates of one session: made at its start, good for its own calls only, kept in memory.

Both ends prove who they are, to an authority whose key never leaves the API process.
"""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from serving.cluster.ray.messages import Tls
from serving.cluster.ray.tls_context import DRIVER, INSTANCE

_SKEW = datetime.timedelta(days=1)  # between the clocks of machines
_VALID = datetime.timedelta(days=3650)  # longer than any server runs


class Authority:
    """Vouches for the driver of one session and for its instances."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named("hocket session")
        self._certificate = (
            _builder(self._name, self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def for_driver(self) -> Tls:
        return self._issue(DRIVER, ExtendedKeyUsageOID.SERVER_AUTH)

    def for_instance(self) -> Tls:
        return self._issue(INSTANCE, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(self, host: str, usage: x509.ObjectIdentifier) -> Tls:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_named(host), self._name, key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return Tls(
            authority=_pem(self._certificate), certificate=_pem(certificate), key=secret.decode()
        )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _VALID)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
