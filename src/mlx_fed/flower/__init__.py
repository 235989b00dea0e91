"""The Fleet API's server and client, on Flower's private modules: no other folder imports those.

Each private module, and what it is needed for (a test compares the list with the imports):

Messages, and the objects that they are sent as
    ``flwr.app.message``: ``remove_content_from_message``, as a message is pushed without content.
    ``flwr.common.constant``: limits, names and statuses of the protocol; error codes of replies.
    ``flwr.common.serde``: messages from and to protobuf.
    ``flwr.proto``: the protocol's generated protobuf classes.
    ``flwr.supercore.constant``: separators in an object's bytes; names of the signed headers.
    ``flwr.supercore.inflatable.inflatable_object``: ids, trees and bodies of objects.
    ``flwr.supercore.inflatable.inflatable_utils``: validation and inflation of objects.
    ``flwr.supercore.task_identity``: the sender of messages that this process makes.

A node's end
    ``flwr.client``: the base class of clients of the deprecated API.
    ``flwr.supercore.runtime_version_compatibility``: headers with Flower's version.
    ``flwr.supernode.fleet_http_client``: the Fleet API's methods.

The server's end
    ``flwr.server.superlink.linkstate``: the factory that ``authenticate_node`` asks for.
    ``flwr.server.superlink.linkstate.in_memory_linkstate``: nodes, messages and the run.
    ``flwr.supercore.error``: Flower's errors, which both ends read.
    ``flwr.supercore.error.catalog``: HTTP statuses of Flower's errors.
    ``flwr.supercore.object_store``: the factory of the object store.
    ``flwr.supercore.object_store.in_memory_object_store``: objects of the server's messages.
    ``flwr.superlink.federation``: a federation without accounts.
    ``flwr.superlink.routers.fleet.node_auth``: verification of signed requests.
    ``flwr.superlink.servicer.fleet``: handlers of most requests.

Private attributes: a message's ``_message_id`` (``one_run_grid``), an array's ``_chunks``
(``serialize``), and the tables of ``InMemoryLinkState`` and ``InMemoryObjectStore``
(``link_state``, ``link_grid``, ``object_store``). ``tests/flower/test_flower.py`` has one test for
each assumption about them, and runs against Flower's nightly build every week.
"""
