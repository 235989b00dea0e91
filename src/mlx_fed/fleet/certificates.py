"""X.509 certificates of a federation's server, their authority, and TLS contexts.

Nodes have no certificates: they are authenticated by their keys (``node_list``).
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..errors import FedError
from ..flower.proxies import Proxy, connection_to

_YEARS = timedelta(days=3650)
_MONTHS = timedelta(days=397)
_DAY = timedelta(days=1)
"""Time by which a node's clock may be behind."""
_HANDSHAKE_TIMEOUT = 10.0


class CertificateError(FedError):
    """Certificates that cannot be used, or that are not the server's."""


class NoTLS(CertificateError):
    """A server without TLS."""


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key on P-256 for an authority or a server."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as unencrypted PEM (PKCS #8)."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def make_authority(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The self-signed certificate (PEM) of a federation's authority."""
    name = _name("mlx-fed federation")
    public = key.public_key()
    certificate = (
        _builder(name, name, public, _YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(certificate)


def issue(
    authority: bytes,
    authority_key: bytes,
    key: ec.EllipticCurvePrivateKey,
    hosts: list[str],
) -> bytes:
    """A server's certificate for these hosts, followed by its authority's (PEM).

    The authority's is sent because a node with a token has only its fingerprint.
    """
    issuer = x509.load_pem_x509_certificate(authority)
    signing: Any = serialization.load_pem_private_key(authority_key, None)
    if signing.public_key() != issuer.public_key():
        raise CertificateError("The authority's key is not that of its certificate.")
    try:
        names = x509.SubjectAlternativeName([_alternative(host) for host in dict.fromkeys(hosts)])
    except ValueError as error:
        raise CertificateError(
            f"No certificate has such a name: {error}. Write it as DNS does (xn--...)."
        ) from error
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_name("mlx-fed server"), issuer.subject, key.public_key(), _MONTHS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(signing, hashes.SHA256())
    )
    return _pem(certificate) + authority


def fingerprint(authority: bytes) -> bytes:
    """SHA-256 of the first certificate in a PEM file.

    Raises:
        CertificateError: If there is none.
    """
    try:
        return x509.load_pem_x509_certificate(authority).fingerprint(hashes.SHA256())
    except ValueError as error:
        raise CertificateError(f"This is no certificate in a PEM file: {error}") from error


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """The server's TLS context (1.2 or newer).

    Raises:
        CertificateError: If the two do not fit each other or cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise CertificateError(f"Cannot serve with {certificate} and {key}: {error}") from error
    return context


def client_context(authorities: Path | None) -> ssl.SSLContext:
    """A node's TLS context (1.2 or newer) for these authorities (PEM). Default: the system's.

    Raises:
        CertificateError: If there are none in the file.
    """
    try:
        context = ssl.create_default_context(cafile=authorities)
    except (OSError, ssl.SSLError) as error:
        raise CertificateError(
            f"No certificates can be read from {authorities}: {error}"
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def fetch_authority(
    host: str, port: int, expected_fingerprint: bytes, proxy: Proxy | None = None
) -> bytes:
    """The certificate (PEM) with this fingerprint, from a server's TLS handshake.

    No request is sent. That the server has the key as well is verified by the next connection.

    Raises:
        OSError: If there is no server, or the connection ends before its certificate.
        CertificateError: If the server has other certificates.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    opening = connection_to(host, port, proxy, timeout=_HANDSHAKE_TIMEOUT)
    with closing(opening):
        opening.connect()
        try:
            with context.wrap_socket(opening.sock, server_hostname=host) as connection:
                chain = _certificate_chain_of(connection)
        except ssl.SSLError as error:
            if error.reason != "WRONG_VERSION_NUMBER":  # such as a forwarder without its server
                raise
            raise NoTLS("what answers there does not encrypt") from error
    for der in chain:
        certificate = x509.load_der_x509_certificate(der)
        if certificate.fingerprint(hashes.SHA256()) == expected_fingerprint:
            return _pem(certificate)
    raise CertificateError("it has another certificate than the token was made for")


def speaks_tls(host: str, port: int, proxy: Proxy | None = None) -> bool:
    """Whether a server uses TLS."""
    try:
        fetch_authority(host, port, b"", proxy)
    except NoTLS:
        return False
    except CertificateError:
        return True
    except OSError:
        return False
    return False


def local_addresses(host: str) -> list[str]:
    """Names and addresses of this machine, for its certificate."""
    candidates = ["localhost", "127.0.0.1", "::1", outward_address(), socket.gethostname(), host]
    return [
        name for name in candidates if name and name.isascii() and name not in ("0.0.0.0", "::")
    ]


def outward_address() -> str | None:
    """This machine's address on the network it would use, or else that of its name; nothing is sent
    to find out. ``None`` where it has none that others reach."""
    for family, remote in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((remote, 9))
            return str(probe.getsockname()[0])
    with suppress(OSError):  # a network of its own, with no way out of it
        for family, kind, _, _, candidate in socket.getaddrinfo(
            socket.gethostname(), None, type=socket.SOCK_DGRAM
        ):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(candidate)
                if not ipaddress.ip_address(str(candidate[0]).partition("%")[0]).is_loopback:
                    return str(candidate[0])
    return None


def ipaddress_or_none(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """A host as an IP address, if it is one."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _certificate_chain_of(connection: ssl.SSLSocket) -> list[bytes]:
    if hasattr(connection, "get_unverified_chain"):  # Python 3.13
        return list(connection.get_unverified_chain())
    ssl_object: Any = connection._sslobj  # type: ignore[attr-defined]
    return [
        ssl.PEM_cert_to_DER_cert(certificate.public_bytes())
        for certificate in ssl_object.get_unverified_chain()
    ]


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lasts: timedelta
) -> x509.CertificateBuilder:
    start = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _DAY)
        .not_valid_after(start + lasts)
    )


def _usage(**uses: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
        "key_cert_sign crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: uses.get(name, False) for name in names.split()})


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    ip_address = ipaddress_or_none(host)
    return x509.IPAddress(ip_address) if ip_address else x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
