"""People: names, pseudonyms, roles, passwords (argon2id) and sessions."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from puna.core.errors import PunaError
from puna.post.annotate.settings import ROLES, Role
from puna.post.annotate.store import Store

if TYPE_CHECKING:
    from argon2 import PasswordHasher

SESSION_S = 12 * 3600.0
LEAST_PASSWORD_CHARS = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class User:
    """Somebody who works at the desk.

    Attributes:
        id: Number in the desk.
        name: To log in with.
        pseudonym: What exports call them.
        role: What they may do; see :data:`~puna.post.annotate.settings.ROLES`.
    """

    id: int
    name: str
    pseudonym: str
    role: Role

    def may(self, role: Role) -> bool:
        """Tell whether they may do what a role may."""
        return ROLES.index(self.role) >= ROLES.index(role)


def _hasher() -> PasswordHasher:
    try:
        from argon2 import PasswordHasher
    except ImportError as error:
        raise PunaError("argon2-cffi is not installed", "pip install 'puna[annotate]'") from error
    return PasswordHasher()  # argon2id with the parameters of RFC 9106, low memory


def add_user(store: Store, name: str, role: str, password: str) -> User:
    """Add somebody.

    Raises:
        PunaError: The name is taken or odd, the role unknown, the password short.
    """
    if not _NAME.fullmatch(name):
        raise PunaError(f"user name {name!r} is not allowed", "use letters, digits and . _ @ -")
    if role not in ROLES:
        raise PunaError(f"unknown role {role!r}", f"choose one of {', '.join(ROLES)}")
    if len(password) < LEAST_PASSWORD_CHARS:
        raise PunaError(
            f"the password of {name} has fewer than {LEAST_PASSWORD_CHARS} characters",
            "choose a longer one",
        )
    hashed = _hasher().hash(password)
    pseudonym = f"a-{secrets.token_hex(4)}"
    with store.write() as tx:
        if tx.one("SELECT 1 FROM users WHERE name = ?", name):
            raise PunaError(f"user {name!r} is there already", "choose another name")
        found = tx.run("INSERT INTO users (name, pseudonym, role, password) VALUES (?, ?, ?, ?)",
                       name, pseudonym, role, hashed).lastrowid  # fmt: skip
        assert found is not None
        tx.event("user.added", None, user=found, pseudonym=pseudonym, role=role)
    return User(found, name, pseudonym, cast("Role", role))


def change_user(store: Store, name: str, role: str | None, active: bool | None) -> User:
    """Change somebody's role, or whether they may log in; their sessions end.

    Raises:
        PunaError: There is nobody of this name, or no such role.
    """
    user = get_user(store, name)
    role = user.role if role is None else role
    if role not in ROLES:
        raise PunaError(f"unknown role {role!r}", f"choose one of {', '.join(ROLES)}")
    with store.write() as tx:
        tx.run("UPDATE users SET role = ?, active = ifnull(?, active) WHERE id = ?", role,
               None if active is None else int(active), user.id)  # fmt: skip
        tx.run("DELETE FROM sessions WHERE user = ?", user.id)
        tx.event("user.changed", None, user=user.id, role=role, active=active)
    return get_user(store, name)


def get_user(store: Store, name: str) -> User:
    """Return somebody by name.

    Raises:
        PunaError: There is nobody of this name.
    """
    row = store.one("SELECT * FROM users WHERE name = ?", name)
    if row is None:
        raise PunaError(f"there is no user {name!r}", "list them: puna annotate user list DESK")
    return User(row["id"], row["name"], row["pseudonym"], row["role"])


def log_in(store: Store, name: str, password: str) -> str | None:
    """Return the token of a new session, or None when name or password are wrong."""
    from argon2.exceptions import InvalidHashError, VerificationError

    hasher = _hasher()
    row = store.one("SELECT id, password FROM users WHERE name = ? AND active = 1", name)
    # An unknown name takes as long as a wrong password, so that names cannot be found by time.
    hashed = row["password"] if row is not None else _nobody(hasher)
    try:
        hasher.verify(hashed, password)
    except (VerificationError, InvalidHashError):
        return None
    if row is None:
        return None
    token = secrets.token_urlsafe(32)
    now_s = time.time()
    with store.write() as tx:
        tx.run("DELETE FROM sessions WHERE expires_s < ?", now_s)
        tx.run("INSERT INTO sessions VALUES (?, ?, ?)", _stored(token), row["id"],
               now_s + SESSION_S)  # fmt: skip
    return token


_NOBODY: list[str] = []


def _nobody(hasher: PasswordHasher) -> str:
    if not _NOBODY:
        _NOBODY.append(hasher.hash(secrets.token_hex(16)))
    return _NOBODY[0]


def who(store: Store, token: str) -> User | None:
    """Return whose session it is, None when it is over or was never."""
    row = store.one(
        "SELECT u.* FROM sessions s JOIN users u ON u.id = s.user"
        " WHERE s.token = ? AND s.expires_s > ? AND u.active = 1",
        _stored(token), time.time(),
    )  # fmt: skip
    return None if row is None else User(row["id"], row["name"], row["pseudonym"], row["role"])


def log_out(store: Store, token: str) -> None:
    """End a session."""
    with store.write() as tx:
        tx.run("DELETE FROM sessions WHERE token = ?", _stored(token))


def csrf_of(store: Store, token: str) -> str:
    """Return what a form of this session must send along."""
    return hmac.new(store.key, b"csrf:" + token.encode(), hashlib.sha256).hexdigest()


def _stored(token: str) -> str:
    """Only a hash of a token is kept: who reads the file cannot enter with it."""
    return hashlib.sha256(token.encode()).hexdigest()
