"""Workers that run jobs, engines that host workers, and the protocol between driver and worker."""
