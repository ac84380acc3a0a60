"""Labels that clients or operators choose, bounded: what is beyond the bound is `other`."""

from __future__ import annotations

# Clients choose classes. So many are kept over all tenants; and so many of each tenant's in any case, so that one tenant
# with ever new names does not take the labels of the others.
MAX_CLASSES, OWN_CLASSES = 1000, 16
NO_CLASS = "none"
# Tenants have keys, so an operator has made each of them.
MAX_TENANTS = 1000
# A model is known once the engine has answered for it, so that names that clients invent fill no label.
MAX_MODELS = 100
OTHER = "other"


class BoundedLabels:
    """The values that labels have taken so far."""

    def __init__(self) -> None:
        self._classes: set[str] = set()
        self._classes_of: dict[str, int] = {}  # how many of the classes each tenant was the first to use
        self._tenants: set[str] = set()
        self._models: set[str] = set()

    def agent_class(self, tenant: str, agent_class: str | None) -> str:
        if agent_class is None:
            return NO_CLASS
        if agent_class not in self._classes:
            tenant = self.tenant(tenant)
            own = self._classes_of.get(tenant, 0)
            if own >= OWN_CLASSES and len(self._classes) >= MAX_CLASSES:
                return OTHER
            self._classes_of[tenant] = own + 1
            self._classes.add(agent_class)
        return agent_class

    def tenant(self, tenant: str) -> str:
        if tenant not in self._tenants:
            if len(self._tenants) >= MAX_TENANTS:
                return OTHER
            self._tenants.add(tenant)
        return tenant

    def model(self, model: str | None, *, served: bool) -> str:
        """served: the engine has just answered for it."""
        if model in self._models:
            return model
        if model is None or not served or len(self._models) >= MAX_MODELS:
            return OTHER
        self._models.add(model)
        return model
