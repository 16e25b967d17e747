"""The gateway beside other routers: `steersman bench gateway`."""
