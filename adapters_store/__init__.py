"""Where adapter versions live: immutable blobs and manifests in object storage, their index in Valkey."""
