"""`python -m bot all | discord | telegram | worker | health ROLE`: the processes of the service.

`all` runs every adapter that has a token, with the fish in the same process, or at the far end of the queue when
GUPPY_REDIS_URL is set. The other roles are for one process (one container) each and need Redis.

An adapter is a module with `async def serve(settings: Settings, fish: Fish, stop: asyncio.Event) -> None`: it connects,
beats its `health.pulse`, and when `stop` is set takes no more questions, answers those it has, and returns (within 8
seconds). It raises `Refusal` when a person must change something. The fish is ready when `serve` is called.
"""
