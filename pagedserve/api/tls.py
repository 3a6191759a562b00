"""HTTPS: the certificate that this server shows, and whose certificates clients must have.

A context is made before anything else starts, so that a file that cannot be used ends the start at
once, and is given its certificate again when that was renewed.
"""

from __future__ import annotations

import logging
import ssl

from pagedserve.config import ServerConfig
from pagedserve.errors import StartupError

log = logging.getLogger("pagedserve")


def context(config: ServerConfig) -> ssl.SSLContext | None:
    """TLS 1.2 and later with the configured files; None without. Raises StartupError."""
    if config.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_ca_certs"):
            if getattr(config, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise StartupError(f"{flag} is for HTTPS, which needs --ssl-certfile too")
        return None
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(made, config)
    if config.ssl_ca_certs is not None:
        try:
            made.load_verify_locations(config.ssl_ca_certs)
        except OSError as error:
            raise unusable("--ssl-ca-certs", config.ssl_ca_certs, "certificate", error) from error
        made.verify_mode = ssl.CERT_REQUIRED
    return made


def load_certificate(made: ssl.SSLContext, config: ServerConfig) -> None:
    """Have new connections see the certificate as its files are now. Raises StartupError."""
    assert config.ssl_certfile is not None, "a context is made of a certificate"
    try:
        made.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=no_password)
    except (OSError, ValueError) as error:
        files = " with ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile)))
        pair = "certificate and key that fit each other"
        raise unusable("--ssl-certfile", files, pair, error) from error


def reload_certificate(made: ssl.SSLContext, config: ServerConfig) -> None:
    """As `load_certificate`; one that cannot be used changes nothing, and the log says why."""
    try:
        # Elsewhere first: half of a pair that does not fit would stay in the context.
        load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), config)
        load_certificate(made, config)
        log.warning("--ssl-certfile was read again")
    except StartupError as error:
        log.error("%s; the certificate from before stays in force", error.message)


def no_password() -> str:
    """What OpenSSL is given for an encrypted key: asking at a terminal would hang a service."""
    raise ValueError("the key is encrypted; give one without a pass phrase, readable by you only")


def unusable(flag: str, files: str, wanted: str, error: Exception) -> StartupError:
    """The error for a file that cannot be read, or holds something else."""
    reason = getattr(error, "strerror", None) or error
    if isinstance(error, ssl.SSLError):
        reason = f"there is no {wanted} in PEM form ({error.reason or 'not PEM'})"
    return StartupError(f"{flag} {files} cannot be used: {reason}")
