"""Images: pull them from registries or archives, store their layers, and make root filesystems of them.

image_store   the whole as the daemon uses it          reference, manifest, platforms   documents and names
puller        registry or archive -> layers, index     hosts, auth, registry/           where and how to pull
index         which images are stored                  archive                          images in files
layers, gc    unpacked layers and their removal        blobs, compression               a layer's bytes
stores/       root filesystems (`RootfsStore`)         layer, tree, tar                 unpacking, as root
"""
