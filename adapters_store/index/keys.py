"""The Valkey keys of the index.

pp:adapters:{tenant}                   sorted set   adapter names
pp:adapters:{tenant}:last              hash         name -> highest version ever; outlives the adapter
pp:adapters:{tenant}:bytes             string       sum over all versions, deleted ones included; counted
                                                    again where it is missing
pp:adapter:{tenant}:{name}:versions    hash         version -> Version
pp:adapter:{tenant}:{name}:aliases     hash         alias -> its target as text, see alias_target.py
pp:adapter:{tenant}:{name}:state       hash         revision, tag:{alias}: ETags; pin: of `latest`;
                                                    undo:{alias}: earlier targets, newest first;
                                                    lost:{alias}: its target, until that is restored
pp:adapter:{tenant}:{name}:history     list         its history, newest first
pp:adapter:{tenant}:{name}:deleted     hash         version -> Gone
pp:deleted:{tenant}                    sorted set   names with deleted versions
pp:deleted                             sorted set   manifests of deleted versions -> deletion (ms)
pp:deleting                            set          tasks manifest#token, see deletions.py
pp:staged                              sorted set   unpublished blobs, see blob_leases.py
pp:once:{token}                        string       the answer of a change, see lua_prelude.py
"""

DELETED = "pp:deleted"
DELETING = "pp:deleting"
STAGED = "pp:staged"


def names_key(tenant: str) -> str:
    """Where the tenant's adapter names are; of "", the prefix of all tenants' keys."""
    return f"pp:adapters:{tenant}"


def bytes_key(tenant: str) -> str:
    return f"pp:adapters:{tenant}:bytes"


def last_number_key(tenant: str) -> str:
    return f"pp:adapters:{tenant}:last"


def adapter_keys(tenant: str, name: str) -> list[str]:
    """The keys of versions, aliases, state, history and deleted."""
    stem = f"pp:adapter:{tenant}:{name}"
    return [f"{stem}:{kind}" for kind in ("versions", "aliases", "state", "history", "deleted")]


def deleted_names_key(tenant: str) -> str:
    """Names with deleted versions; of "", the prefix of all tenants' keys."""
    return f"{DELETED}:{tenant}"


def answer_key(token: str) -> str:
    return f"pp:once:{token}"
