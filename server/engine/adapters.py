"""Builds the adapter loader, the device cache and the banks of an engine."""

from adapters_store.object_store.store import Objects
from server.adapters.cache.device_cache import AdapterCache
from server.adapters.cache.disk_tier import DiskTier
from server.adapters.cache.eviction_policy import FairShares
from server.adapters.cache.ram_tier import RamTier
from server.adapters.loading.device_copy import DeviceCopier
from server.adapters.loading.loader import Loader
from server.adapters.loading.packing import Packer
from server.adapters.loading.parse_cache import HeaderLimits
from server.adapters.methods import build_methods
from server.adapters.methods.interface import Bank
from server.engine.model.base_model import Placement
from server.engine.served_model import ServedModel
from server.settings import Settings


def build_adapters(
    settings: Settings, model: ServedModel, placement: Placement
) -> tuple[Loader, AdapterCache]:
    """The loader and the device cache, with common fair shares. Installs the banks in `model`."""
    methods = build_methods(settings.max_lora_rank, placement.narrow)
    bank_size = (model.base, settings.adapter_slots, placement.device, placement.dtype)
    by_type: dict[type[Bank], Bank] = {kind: kind(*bank_size) for kind in {m.bank for m in methods.values()}}
    banks = {name: by_type[method.bank] for name, method in methods.items()}
    model.install(banks)
    shares = FairShares()
    packer = Packer(
        methods,
        model.base,
        model.weights,
        placement.dtype,
        HeaderLimits(settings.max_header_bytes, settings.max_tensors),
        pin_memory=placement.device.type == "cuda",
    )
    loader = Loader(
        Objects.open(settings.store_url, settings.store_config),
        DiskTier(settings.data_dir / "cache" / "adapters", settings.adapter_disk_bytes, shares),
        RamTier(settings.adapter_ram_bytes, shares),
        packer,
    )
    cache = AdapterCache(
        banks,
        loader,
        slots=settings.adapter_slots,
        budget=settings.adapter_device_bytes,
        copy=DeviceCopier(placement.device).start,
        shares=shares,
    )
    return loader, cache
