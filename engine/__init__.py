"""One model instance: executes step plans on a device. No ray, no fastapi, no asyncio, no text."""
