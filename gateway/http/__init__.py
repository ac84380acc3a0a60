"""The bytes of client connections: limits on what a client may send and how slowly, bounded bodies, disconnects.

connections        all client connections together: how many, which give way, the sweep
client_connection  one client connection: what its client may send, and how long it may take; on uvicorn's protocol
answer_transports  when the bytes of an answer leave, and what closing means
uvicorn_facts      what is read of uvicorn's privates, checked at start
disconnect         cancels a request's task when its client disconnects
reading            headers, and bodies of bounded size
writing            answers as ASGI messages
"""
