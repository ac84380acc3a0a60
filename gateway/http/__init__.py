"""The bytes of client connections: limits on what a client may send and how slowly, bounded bodies, disconnects.

connections  limits of one client connection, and of all together, on uvicorn's protocol
disconnect   cancels a request's task when its client disconnects
reading      headers, and bodies of bounded size
writing      answers as ASGI messages
"""
