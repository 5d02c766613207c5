"""An optimizer around an optimizer: what every such wrapper must forward to be taken for a ``torch.optim.Optimizer``."""

from typing import Any

from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """Forwards to ``self.optimizer``, live: ``param_groups``, ``state`` and ``defaults`` are the wrapped one's own.

    By properties, not by a ``__getattr__`` for all: that would leak private marks of the wrapped class (GradScaler stops
    unscaling at ``_step_supports_amp_scaling``).
    """

    optimizer: Optimizer

    def _wrap(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a constructed torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        inner = self.innermost
        if "_optimizer_step_pre_hooks" not in inner.__dict__:  # a composite that did without Optimizer.__init__
            try:
                Optimizer.__setstate__(inner, {})  # gives it torch's hooks
            except AttributeError as error:
                raise TypeError(
                    f"{type(inner).__name__} did not call torch.optim.Optimizer.__init__ and lacks {error.name!r}: call "
                    "super().__init__(params, defaults) in it"
                ) from error

    @property
    def innermost(self) -> Optimizer:
        """The optimizer whose step changes the parameters, under accelerate's, DeepSpeed's and other wrappers."""
        inner = self.optimizer
        while True:
            held = (inner.__dict__.get(name) for name in ("optimizer", "_base_optimizer"))  # the latter: timm's Lookahead
            deeper = next((optimizer for optimizer in held if isinstance(optimizer, Optimizer)), None)
            if deeper is None:
                return inner
            inner = deeper

    def _attach(self) -> None:
        # Optimizer.__init__ would assign state and param_groups, through our properties: wiping the wrapped one's
        super().__setstate__({})

    def __setstate__(self, state: "dict[str, Any]") -> None:
        self.__dict__.update(state)
        self._attach()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """The wrapped optimizer's ``zero_grad``, given what it is given: not every optimizer knows ``set_to_none``."""
        self.optimizer.zero_grad(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The wrapped optimizer's ``add_param_group``."""
        self.optimizer.add_param_group(param_group)

    def train(self, *args: Any) -> None:
        """For Trainer and schedule-free optimizers: passed on to the wrapped optimizer, if it has a ``train``."""
        if hasattr(self.optimizer, "train"):
            self.optimizer.train(*args)

    def eval(self, *args: Any) -> None:
        """Passed on to the wrapped optimizer, if it has an ``eval``."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval(*args)

    @property
    def is_second_order(self) -> bool:
        """timm asks for it; there where the wrapped optimizer has it."""
        return bool(self.optimizer.is_second_order)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        # only reached where nothing else knows the name
        inner = self.__dict__.get("optimizer")
        if inner is not None and hasattr(inner, name) and not name.startswith("__"):
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}; the {type(inner).__name__} it wraps has: use optimizer.optimizer "
                "where that is asked for"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def param_groups(self) -> "list[dict[str, Any]]":
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> "dict[str, Any]":
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: Any) -> None:
        self.optimizer.defaults = value

    def state_dict(self) -> "dict[str, Any]":
        """The wrapped optimizer's state dict, with this optimizer's hooks run around it."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self.optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            result = after(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    def load_state_dict(self, state_dict: "dict[str, Any]") -> None:
        """Load into the wrapped optimizer, with this optimizer's hooks run around it."""
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        self._load(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, state_dict: "dict[str, Any]") -> None:
        self.optimizer.load_state_dict(state_dict)
